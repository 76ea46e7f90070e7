"""HTML pages from ``templates/``: every value is escaped where it is shown, and a name without a value is an error.

Styles and scripts are files of ours in the same folder, put into the page as they are. A page with script has a policy that
lets a browser run exactly those files, by their hashes, and load nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache, partial
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

_TEMPLATES = Environment(
    loader=PackageLoader("lit_opd.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def render(template_name: str, **values: Any) -> str:
    """The page of one template.

    Args:
        template_name: file in ``templates/``.
        values: what the template names; their text is data, never part of the template.
    """
    return _TEMPLATES.get_template(template_name).render(values)


def embedded(data: Any) -> Markup:
    """Plain values as JSON for a ``<script type="application/json">``: no text in them can end the element.

    Raises:
        ValueError: NaN or infinity, which JSON does not have.
    """
    return htmlsafe_json_dumps(data, dumps=partial(json.dumps, allow_nan=False, ensure_ascii=False))


@cache
def inlined(name: str) -> Markup:
    """A style or script file of ``templates/``, as it is."""
    text = files("lit_opd.report").joinpath("templates", *name.split("/")).read_text(encoding="utf-8")
    assert "</script" not in text and "</style" not in text, f"{name} would end its element"
    return Markup(text)


@cache
def allowed(*names: str) -> str:
    """The sources of a policy that lets these scripts run and no other."""
    hashes = (hashlib.sha256(inlined(name).encode()).digest() for name in names)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in hashes)


_TEMPLATES.globals |= {"inlined": inlined, "allowed": allowed}
