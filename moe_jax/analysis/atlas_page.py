"""Shows the analysis of a corpus: as lines, as a page without a network, and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_jax.analysis import gaps
from moe_jax.analysis.expert_maps import maps_of
from moe_jax.analysis.page import write_page
from moe_jax.analysis.report import visible
from moe_jax.files import finite, replaced
from moe_jax.monitor import in_words

PAGE = "analyze.html"


def lines(found: dict[str, Any]) -> list[str]:
    """Returns one line per layer and group, and the alarms, gaps and drifts that there are."""
    shown = []
    for layer in found["layers"]:
        information = "  ".join(f"{name} {nats:.3f}" for name, nats in layer["information"].items())
        shown.append(
            f"{layer['layer']}  entropy {layer['entropy']:.3f}  dead {len(layer['dead'])}  "
            f"hot {len(layer['hot'])}  information (nats): {information}{_ahead(layer)}"
        )
    for group in found["groups"]:
        shown.append(
            f"group {group['name']}  documents {group['documents']}  {_quality(group)}"
            f"dropped {group['dropped']:.2%}  unrouted {group['unrouted']:.2%}"
        )
    shown += [f"alarm, group {line}" for line in _alarms(found)]
    if found["gap"]:
        shown += gaps.in_words(found["gap"])
    for one in found["drift"]:
        shown.append(f"group {one['group']} against {one['reference']}: {one['words']}")
    for one in found["saturation"]:
        shown.append(f"step {one['step']} to the analysed one: {one['drift']['words']}")
    return shown


def _alarms(found: dict[str, Any]) -> list[str]:
    """Returns one line for each group and each condition that it meets."""
    return [f"{one['name']}: {words}" for one in found["groups"] for words in in_words(one)]


def _quality(group: dict[str, Any]) -> str:
    """Returns the loss and the bits per byte of a group, if the model gives texts a likelihood."""
    if group["loss"] is None:
        return ""
    return f"loss {group['loss']:.3f}  bits per byte {group['bits_per_byte']:.3f}  "


def _ahead(layer: dict[str, Any]) -> str:
    """Returns the accuracy of the prediction of the next layer, if there is one."""
    found = layer["hidden_predicts_next"]
    return "" if found is None else f"  predicts the next layer {found['accuracy']:.3f}"


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
        temporary.write_text(json.dumps(finite(found), allow_nan=False), encoding="utf-8")
    write_page(
        "atlas.html.j2",
        page,
        title=title,
        found=found,
        alarms=_alarms(found),
        gaps=gaps.in_words(found["gap"]) if found["gap"] else [],
        fewest=gaps.FEWEST,
        maps=[maps_of(layer) for layer in found["layers"]],
        visible=visible,
    )
    return page, numbers
