"""What ``mkdocs.yml`` cannot say: pages that stand outside docs/, links to them, and the reference made from the docstrings.

The pages are written for the repository. Here README becomes the home page, the table of pages ``pages.html``, and any other
file that a page links to comes along under ``project/``.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from lit_opd import _PLACES  # the public names, by module; loads no torch

ROOT = Path(__file__).resolve().parents[1]
MOVED = {"README.md": "index.md", "docs/index.md": "pages.md", "docs/leaderboard.html": "leaderboard-drawn.html"}
OUTSIDE = "project"  # folder of the site for files that stand outside docs/
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_FENCE = re.compile(r"(^```.*?^```)", flags=re.S | re.M)
_PAGES = {  # page of the reference -> title, modules
    "module": ("Module", ["lit_opd.module", "lit_opd.models.student"]),
    "data": ("Data", ["lit_opd.prompts"]),
    "weighting": ("Weighting", ["lit_opd.weighting"]),
    "advantage": ("Advantage", ["lit_opd.advantage"]),
    "objective": ("Objective", ["lit_opd.objective"]),
    "teacher": ("Teacher", ["lit_opd.teacher"]),
    "sampler": ("Sampler", ["lit_opd.rollout", "lit_opd.turns"]),
    "evaluation": ("Evaluation", ["lit_opd.evaluation"]),
    "callbacks": ("Callbacks", ["callbacks"]),
    "records": ("Records and errors", ["lit_opd.types", "lit_opd.errors"]),
}
_ALL_CLASSES = ("lit_opd.weighting", "lit_opd.advantage", "callbacks")  # every public class, not the public names alone


def reference() -> dict[str, str]:
    """The pages of the reference: path in the site -> Markdown, a ``:::`` block for every name."""
    pages = {}
    for name, (title, modules) in _PAGES.items():
        blocks = [block for module in modules for block in map(_block, names(module))]
        pages[f"api/{name}.md"] = "\n".join([f"# {title}", "", *blocks])
    return pages


def names(module: str) -> list[str]:
    """Full names of the public classes that the reference shows of a module, each where it is defined."""
    folder = ROOT / module.replace(".", "/")
    if module not in _ALL_CLASSES:
        return [f"{module}.{name}" for name in _PLACES[module]]
    files = sorted(folder.glob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    found = [name for file in files for name in _classes(file)]
    bases = {"WeightingStrategy", "AdvantageTransform"}
    return sorted(found, key=lambda name: name.rpartition(".")[2] not in bases)


def _classes(file: Path) -> list[str]:
    """Public classes of a file that have a base; of callbacks those that ``__init__`` names."""
    module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    tree = ast.parse(file.read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    if file.parent.name == "callbacks":
        named = (ROOT / "callbacks" / "__init__.py").read_text(encoding="utf-8")
        classes = [node for node in classes if f'"{node.name}"' in named]
    protocols = [node for node in classes if any(ast.unparse(base) == "Protocol" for base in node.bases)]
    return [f"{module}.{node.name}" for node in classes if node not in protocols]


def _block(name: str) -> str:
    return f"::: {name}\n    options:\n      heading: {name.rpartition('.')[2]}\n"


def site_path(path: str) -> str:
    """Where a file of the repository stands in the site; both relative, with slashes."""
    if path in MOVED:
        return MOVED[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{OUTSIDE}/{path}"


def repository_path(path: str) -> str:
    """The other way round."""
    back = {there: here for here, there in MOVED.items()}
    return back.get(path) or (path.removeprefix(f"{OUTSIDE}/") if path.startswith(f"{OUTSIDE}/") else f"docs/{path}")


def with_site_links(text: str, page: str) -> str:
    """Markdown whose relative links lead to the same files in the site; blocks of code stay as they are.

    Args:
        text: Markdown.
        page: of the repository, from which its links are seen.
    """

    def moved(match: re.Match[str]) -> str:
        target = match[2]
        if ":" in target:
            return match[0]
        there = site_path(posixpath.normpath(posixpath.join(posixpath.dirname(page), target)))
        return f"{match[1]}{posixpath.relpath(there, posixpath.dirname(site_path(page)) or '.')}{match[3]}"

    parts = _FENCE.split(text)
    return "".join(part if part.startswith("```") else _LINK.sub(moved, part) for part in parts)


def linked(page: str) -> set[str]:
    """Files outside docs/ that a page of the repository leads to, by any way."""
    found: set[str] = set()
    waiting = [page]
    while waiting:
        here = waiting.pop()
        targets = [
            match[1] for match in _LINK.findall((ROOT / here).read_text(encoding="utf-8")) if ":" not in match[1]
        ]
        paths = {posixpath.normpath(posixpath.join(posixpath.dirname(here), target)) for target in targets}
        new = {path for path in paths if not path.startswith("docs/") and (ROOT / path).is_file()} - found
        found |= new
        waiting += [path for path in new if path.endswith(".md")]
    return found


# -- what mkdocs calls -----------------------------------------------------------------------------------------------------


def on_files(files: Any, config: Any) -> Any:
    """Move the two home pages; add files outside docs/ and the reference."""
    from mkdocs.structure.files import File

    pages = [file.src_uri for file in files if file.src_uri.endswith(".md")]
    outside = {path for page in pages for path in linked(f"docs/{page}")} | {"README.md"}
    index = files.get_file_from_path("index.md")
    if index is not None:
        files.remove(index)
    for path in sorted(
        outside | {"docs/index.md", "docs/leaderboard.html"}
    ):  # leaderboard.md becomes a leaderboard.html itself
        files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
    for path, text in reference().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links of a page as the site has them."""
    path = page.file.src_uri
    return markdown if path.startswith("api/") else with_site_links(markdown, repository_path(path))
