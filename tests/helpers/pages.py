"""What HTML pages are checked with: strings that would break out, and a reader of what a browser would see."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from html.parser import HTMLParser

# Markup, quotes, and the template language that makes the pages
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</pre></section></main><h1>x</h1>",
    "' onmouseover='alert(1)",
    "<!-- & &amp; &lt;script&gt; -->",
    "</title></style><style>*{display:none}</style>",
    "\"&'",
    "{{ 7*7 }}",
    "{% raw %}",
    "{% endraw %}{% endblock %}{# gone #}{{ undefined }}",
]


class Reader(HTMLParser):
    """Tags in order, names of attributes, values of attributes, text, and the attributes of token spans."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.names: set[str] = set()
        self.values: list[str] = []
        self.titles: list[str] = []
        self.styles: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect."""
        self.tags.append(tag)
        self.names |= {name for name, _ in attrs}
        values = dict(attrs)
        self.values += [value or "" for value in values.values()]
        if "t" in (values.get("class") or "").split():
            self.titles.append(values["title"] or "")
            self.styles.append(values["style"] or "")

    def handle_data(self, data: str) -> None:
        """Collect."""
        self.text += data


def assert_only_text(page: str, plain: str, *, shown: int, text: str = "".join(HOSTILE)) -> None:
    """Tags and attributes of ``page`` are those of ``plain``, and ``text`` is read ``shown`` times as it was written.

    Scripts are the package's own, the same on every page, and the only ones that the page's policy lets run.
    """
    found, expected = Reader(page), Reader(plain)
    assert found.tags == expected.tags and found.names == expected.names
    assert found.text.count(text) == shown, found.text.count(text)
    assert not {name for name in found.names if name.startswith("on")}
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.S)
    assert scripts == re.findall(r"<script>(.*?)</script>", plain, flags=re.S)
    assert found.tags.count("script") == len(scripts) + page.count('<script type="application/json" id="data">')
    hashes = {base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts}
    policy = re.findall(r'Content-Security-Policy" content="(.*?)">', html.unescape(page))[0]
    assert set(re.findall(r"sha256-([A-Za-z0-9+/=]+)", policy)) == hashes
    for script in scripts:
        page = page.replace(script, "")
    assert "http" not in page.replace("http-equiv", "")
    assert "Content-Security-Policy\" content=\"default-src 'none'" in page
