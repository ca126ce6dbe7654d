"""Writes HTML pages that need no network, from the templates of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from moe_jax.files import replaced


def write_page(template: str, path: Path, **values: Any) -> Path:
    """Writes a page and returns its path.

    Args:
        template: Name of the template.
        path: File to write.
        **values: Values of the template.

    Raises:
        WriteError: If the file cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("moe_jax.analysis", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(template).render(**values)
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
