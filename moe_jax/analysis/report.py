"""Writes the report of a run: one HTML file that needs no network.

The command ``moe-jax report --workdir=runs/quickstart`` writes the file again.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.analysis import figures
from moe_jax.analysis.described import what_was_run
from moe_jax.analysis.page import write_page
from moe_jax.training import noise
from moe_jax.training.metrics import METRICS, REPORT, read_metrics

Record = Mapping[str, Any]
_VISIBLE = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}
_BYTES = {f"<0x{ord(character):02X}>": shown for character, shown in _VISIBLE.items()}
# The limit keeps the file of a model with thousands of experts small.
_TOKENS_OF_ALL = 4000
# Number of windows of a run over which the gradient noise scale is averaged.
_NOISE_WINDOWS = 10
_FRACTIONS = ("dropped_fraction", "unrouted_fraction")
_BASELINES = {
    "uniform": "uniform bytes",
    "order2": "order-2 byte model",
    "zlib": "zlib -9, file by file",
}
# Each row has a key of result.json, a name and a format.
_ROWS = (
    ("loss", "validation loss", "{:.4f} nats per token"),
    ("best_possible_loss", "best possible loss", "{:.4f} nats per token"),
    ("accuracy", "validation accuracy", "{:.1%}"),
    ("total_parameters", "parameters", "{:,}"),
    ("active_parameters", "parameters active per token", "{:,}"),
    ("flops_per_token", "FLOPs per token, forward", "{:,}"),
    ("steps", "steps", "{:,}"),
    ("tokens", "training tokens", "{:,}"),
    ("skipped_updates", "updates skipped", "{:,}"),
    ("lost_lines", "history", "{}"),
)


def write_report(workdir: Path) -> Path:
    """Writes ``report.html`` from the files of a workdir and returns its path.

    The report reads ``metrics.jsonl``, ``config.json``, ``result.json`` and ``expert_tokens.json``,
    and omits the sections of files that do not exist yet.

    Raises:
        FileNotFoundError: If the folder contains no run.
        ValueError: If a file is corrupt.
    """
    workdir = Path(workdir)
    if not any((workdir / name).exists() for name in (METRICS, "config.json", "result.json")):
        raise FileNotFoundError(f"{workdir} holds no run: train a model there first")
    records = read_metrics(workdir)
    result, config, tokens = (
        _json(workdir / name) for name in ("result.json", "config.json", "expert_tokens.json")
    )
    return write_page(
        "report.html.j2",
        workdir / REPORT,
        title=config.get("config", {}).get("name", workdir.resolve().name),
        described=what_was_run(config),
        scores=_scores(result),
        summary=summary(records, result, config),
        curves=_curves(records),
        layers=_layer_rows(records),
        specialisation=result.get("specialisation", {}),
        alarms=_alarms(records),
        router_curves=_router_curves(_of_kind(records, "train")),
        loads=_loads(_of_kind(records, "train")),
        tokens=_visible_table(tokens),
        config=json.dumps(config.get("config", {}), indent=2) if config else "",
    )


def summary(records: Sequence[Record], result: Record, config: Record) -> dict[str, str]:
    """Returns the names and values of the summary table; values that are unknown are omitted."""
    rows = {}
    if not result:
        rows["state"] = f"not finished: step {records[-1]['step']:,}" if records else "not started"
    for key, name, template in _ROWS:
        if result.get(key) is not None:
            rows[name] = template.format(result[key])
    for name, part in result.get("parts", {}).items():
        means = f"{part['loss']:.4f} nats per token, {part['bits_per_byte']:.3f} bits per byte"
        rows[f"validation loss, {name}"] = means
    rates = [r["tokens_per_second"] for r in records if r.get("tokens_per_second")]
    if rates:
        rows["tokens per second, median"] = f"{np.median(rates):,.0f}"
    flops = [r["model_flops_per_second"] for r in records if r.get("model_flops_per_second")]
    if flops:
        rows["model FLOP/s, median"] = f"{np.median(flops):.3g}"
    shares = [r["mfu"] for r in records if r.get("mfu")]
    if shares:
        rows["model FLOPs utilisation, median"] = f"{np.median(shares):.1%}"
    if result.get("seconds") is not None:
        seconds = datetime.timedelta(seconds=round(result["seconds"]))
        rows["wall time since the last start"] = f"{seconds} h"
    if result.get("device"):
        rows["device"] = result["device"]
    if result.get("mesh"):
        rows["mesh"] = ", ".join(f"{axis} {size}" for axis, size in result["mesh"].items())
    if config.get("versions"):
        rows["versions"] = ", ".join(f"{k} {v}" for k, v in config["versions"].items())
    if config.get("git_commit"):
        rows["commit"] = config["git_commit"][:12]
    return rows


def visible(piece: str) -> str:
    """Returns a token's text with visible symbols for white space and unprintable characters."""
    if piece in _BYTES:
        return _BYTES[piece]
    shown = [_VISIBLE.get(c, c if c.isprintable() else f"\\u{ord(c):04x}") for c in piece]
    return "".join(shown) or "(empty)"


def _scores(result: Record) -> list[dict[str, Any]]:
    """Returns name, bits per byte and bar length (1 for the longest) of the model and baselines."""
    if result.get("bits_per_byte") is None:
        return []
    rows = {"this model": result["bits_per_byte"]}
    rows |= {_BASELINES.get(key, key): bits for key, bits in result.get("baselines", {}).items()}
    longest = max((bits for bits in rows.values() if math.isfinite(bits)), default=0.0) or 1.0
    return [
        {"name": name, "bits": bits, "bar": bits / longest if math.isfinite(bits) else 0.0}
        for name, bits in rows.items()
    ]


def _curves(records: Sequence[Record]) -> list[tuple[str, str]]:
    train = _of_kind(records, "train")
    if not train:
        return []
    loss = figures.loss_curve(train, _of_kind(records, "eval"))
    rate = figures.line(train, "learning_rate", "learning rate")
    norm = figures.line(train, "grad_norm", "global norm before clipping", log=True)
    return [("Loss", loss), ("Learning rate", rate), ("Gradient norm", norm), *_noise_curve(train)]


def _noise_curve(train: Sequence[Record]) -> list[tuple[str, str]]:
    """Returns the chart of the smoothed gradient noise scale, if the run has measured it."""
    found = noise.estimates(train)
    steps, scales = noise.smoothed(found, max(len(found.steps) // _NOISE_WINDOWS, 1))
    points = zip(steps.tolist(), scales.tolist(), strict=True)
    shown = [{"step": step, "scale": one} for step, one in points if 0 < one < math.inf]
    if not shown:
        return []
    chart = figures.line(shown, "scale", "tokens, smoothed over a tenth of the run", log=True)
    return [("Gradient noise scale", chart)]


def _router_curves(train: Sequence[Record]) -> list[tuple[str, str]]:
    """Returns titles and charts with one line per MoE layer; a dense model has no charts."""
    layers = train[0]["layers"] if train else []
    if not layers:
        return []
    draw = figures.layer_lines
    charts = [("Dropped assignments", draw(train, "fraction", "dropped_fraction"))]
    dropped, unrouted = (_fractions(train, name) for name in _FRACTIONS)
    # If each token makes one choice, a token without an expert is a dropped assignment.
    if any(unrouted) and unrouted != dropped:
        charts.append(("Tokens without an expert", draw(train, "fraction", _FRACTIONS[1])))
    names = {name: None for layer in layers for name in layer.get("losses", {})}
    charts += [
        (f"Router loss: {name}", draw(train, f"{name} loss", "losses", name)) for name in names
    ]
    return [
        *charts,
        ("Demand on the busiest expert", draw(train, "demand / mean", "max_mean_load")),
        ("Entropy of demand", draw(train, "entropy / log E", "load_entropy")),
    ]


def _fractions(train: Sequence[Record], name: str) -> list[float]:
    return [layer.get(name) or 0.0 for record in train for layer in record["layers"]]


def _loads(train: Sequence[Record]) -> list[tuple[str, str]]:
    layers = train[0]["layers"] if train else []
    return [
        (f"Layer {layer['layer']}", figures.load_map(train, index))
        for index, layer in enumerate(layers)
    ]


def _layer_rows(records: Sequence[Record]) -> list[Record]:
    """Returns the layers of the last evaluation, or else of the last training record."""
    routed = [r for r in records if r.get("layers")]
    return (_of_kind(routed, "eval") or routed or [{"layers": []}])[-1]["layers"]


def _alarms(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Returns each alarm of each layer: its lines of the log, first and last step, newest words."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for record in records:
        for name, layers in record.get("alarms", {}).items():
            for layer, words in layers.items():
                row = rows.setdefault((name, layer), {"first": record["step"], "lines": 0})
                row |= {"name": name, "layer": layer, "last": record["step"], "words": words}
                row["lines"] += 1
    return list(rows.values())


def _visible_table(table: Record) -> list[dict[str, Any]]:
    layers = table.get("layers", [])
    experts = sum(len(layer["experts"]) for layer in layers)
    limit = max(_TOKENS_OF_ALL // max(experts, 1), 3)
    return [
        {
            "layer": layer["layer"],
            "experts": [
                [{**token, "piece": visible(token["piece"])} for token in expert[:limit]]
                for expert in layer["experts"]
            ],
        }
        for layer in layers
    ]


def _of_kind(records: Sequence[Record], kind: str) -> list[Record]:
    return [record for record in records if record["kind"] == kind]


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is corrupt ({error}): delete it") from error
