"""Shows an explanation: as lines for a terminal, as a page without a network, and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from moe_jax.analysis.explain import ExplainedLayer, Explanation
from moe_jax.analysis.page import write_page
from moe_jax.analysis.report import visible
from moe_jax.files import finite, replaced

PAGE = "explain.html"


def lines(explanation: Explanation) -> list[str]:
    """Returns the explanation as lines: one per token, then one per layer and expert of it."""
    found = []
    if explanation.source:
        found.append("source: an effect is the change of the log-likelihood of the whole target")
        for index, piece in enumerate(explanation.source):
            found.append(f"{index:4d} {visible(piece)}")
            found += _of_token(explanation, index, of_source=True)
        found.append("target: an effect is the change of the log-likelihood of the next token")
    for index, piece in enumerate(explanation.pieces):
        after, value = explanation.next_pieces[index], explanation.log_likelihoods[index]
        found.append(f"{index:4d} {visible(piece)}  next {visible(after)}  log p {value:.3f}")
        found += _of_token(explanation, index, of_source=False)
    worst = max(layer.error for layer in explanation.layers)
    found.append(f"sums: the parts of a layer differ from its output by at most {worst:.1e} of it")
    return found


def _of_token(explanation: Explanation, index: int, *, of_source: bool) -> list[str]:
    layers = (layer for layer in explanation.layers if layer.of_source == of_source)
    return [line for layer in layers for line in _of_layer(layer, index)]


def _of_layer(layer: ExplainedLayer, token: int) -> list[str]:
    """Returns one line per choice of a token in a layer, and one for the shared part."""
    width = len(str(layer.num_experts - 1))
    choices = zip(
        *(x[token] for x in (layer.experts, layer.gates, layer.norms, layer.effects)), strict=True
    )
    found = [
        f"       {layer.name}  expert {expert:{width}d}  gate {gate:.3f}  norm {norm:8.3f}  "
        f"effect {effect:+.4f}"
        for expert, gate, norm, effect in choices
        if expert >= 0
    ]
    others = float(layer.others[token])
    return found + [f"       {layer.name}  shared  norm {others:8.3f}"] * (others > 0)


def write_explanation(explanation: Explanation, path: str | Path, title: str) -> tuple[Path, Path]:
    """Writes the page and, beside it, the numbers as JSON.

    Args:
        explanation: The explanation.
        path: HTML file to write; the JSON file has the same name with the ending ``.json``.
        title: Title of the page.

    Returns:
        The paths of the page and of the JSON file.

    Raises:
        WriteError: If a file cannot be written.
    """
    page, numbers = Path(path), Path(path).with_suffix(".json")
    content = finite(explanation.as_dict())
    with replaced(numbers) as temporary:
        temporary.write_text(json.dumps(content, allow_nan=False), encoding="utf-8")
    shown = content | {
        name: [visible(piece) for piece in content[name]]
        for name in ("pieces", "source", "next_pieces")
    }
    worst = max(layer.error for layer in explanation.layers)
    write_page("explain.html.j2", page, title=title, shown=shown, worst=worst)
    return page, numbers
