"""HTML pages from ``templates/``: every value is escaped where it is shown, and a name without a value is an error."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

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
