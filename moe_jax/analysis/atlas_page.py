"""Shows the analysis of a corpus: as lines, as a page without a network, and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_jax.analysis.page import write_page
from moe_jax.analysis.report import visible
from moe_jax.files import replaced

PAGE = "analyze.html"


def lines(found: dict[str, Any]) -> list[str]:
    """Returns one line per layer, one per group, and the gap between groups if there is one."""
    shown = []
    for layer in found["layers"]:
        information = "  ".join(f"{name} {nats:.3f}" for name, nats in layer["information"].items())
        shown.append(
            f"{layer['layer']}  entropy {layer['entropy']:.3f}  dead {len(layer['dead'])}  "
            f"hot {len(layer['hot'])}  information (nats): {information}"
        )
    for group in found["groups"]:
        shown.append(
            f"group {group['name']}  documents {group['documents']}  loss {group['loss']:.3f}  "
            f"bits per byte {group['bits_per_byte']:.3f}  dropped {group['dropped']:.2%}"
        )
    if found["gap"]:
        one = found["gap"]
        low, high = one["interval"]
        shown.append(
            f"gap {one['worst']} - {one['best']}: {one['bits_per_byte']:.3f} bits per byte, "
            f"95% interval {low:.3f} to {high:.3f}"
        )
    return shown


def write_atlas(found: dict[str, Any], path: str | Path, title: str) -> tuple[Path, Path]:
    """Writes the page and, beside it, the numbers as JSON.

    Args:
        found: Result of ``moe_jax.analyze``.
        path: HTML file to write; the JSON file has the same name with the ending ``.json``.
        title: Title of the page.

    Returns:
        The paths of the page and of the JSON file.

    Raises:
        WriteError: If a file cannot be written.
    """
    page, numbers = Path(path), Path(path).with_suffix(".json")
    with replaced(numbers) as temporary:
        temporary.write_text(json.dumps(found), encoding="utf-8")
    write_page("atlas.html.j2", page, title=title, found=found, visible=visible)
    return page, numbers
