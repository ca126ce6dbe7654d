"""The report of a run: one HTML file that needs no network.

``python -m moe_jax.analysis.report --workdir=runs/quickstart`` writes it anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2

from moe_jax.analysis import figures
from moe_jax.training.metrics import read_metrics

REPORT = "report.html"
_VISIBLE = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"})
_BASELINES = {
    "uniform": "uniform bytes",
    "order2": "order-2 byte model",
    "zlib": "zlib -9, file by file",
}


def write_report(workdir: Path) -> Path:
    """Writes ``report.html`` from the files of a workdir and returns its path.

    Reads ``metrics.jsonl``, and ``config.json``, ``result.json`` and ``expert_tokens.json`` where
    they are.
    """
    workdir = Path(workdir)
    records = read_metrics(workdir)
    result = _json(workdir / "result.json")
    config = _json(workdir / "config.json")
    loader = jinja2.PackageLoader("moe_jax.analysis", "")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True)
    text = environment.get_template("report.html.j2").render(
        title=config.get("config", {}).get("name", workdir.name),
        summary=summary(result, config),
        scores=_scores(result),
        charts=_charts(records),
        loads=_loads(records),
        tokens=_visible(_json(workdir / "expert_tokens.json")),
    )
    path = workdir / REPORT
    path.write_text(text)
    return path


def summary(result: dict[str, Any], config: dict[str, Any]) -> dict[str, str]:
    """Returns the rows of the summary table."""
    if not result:
        return {"state": "not finished"}
    mesh = ", ".join(f"{axis} {size}" for axis, size in result["mesh"].items())
    commit = config.get("git_commit") or "unknown"
    return {
        "device": result["device"],
        "mesh": mesh,
        "parameters": f"{result['total_parameters']:,}",
        "active per token": f"{result['active_parameters']:,}",
        "FLOPs per token, forward": f"{result['flops_per_token']:,}",
        "steps": f"{result['steps']:,}",
        "tokens": f"{result['tokens']:,}",
        "seconds": f"{result['seconds']:.0f}",
        "updates skipped": str(result["skipped_updates"]),
        "validation loss": f"{result['loss']:.4f} nats per token",
        "validation accuracy": f"{result['accuracy']:.1%}",
        "versions": ", ".join(f"{k} {v}" for k, v in config.get("versions", {}).items()),
        "commit": commit[:12],
    }


def _scores(result: dict[str, Any]) -> list[tuple[str, float]]:
    if not result:
        return []
    rows = [("this model", result["bits_per_byte"])]
    return rows + [(_BASELINES[name], value) for name, value in result["baselines"].items()]


def _charts(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    train = [record for record in records if record["kind"] == "train"]
    if not train:
        return []
    evaluations = [record for record in records if record["kind"] == "eval"]
    charts = [
        ("Loss", figures.loss_curve(train, evaluations)),
        ("Learning rate", figures.lines(train, "learning_rate", "learning rate")),
        ("Gradient norm", figures.lines(train, "grad_norm", "global norm before clipping")),
    ]
    if train[0]["layers"]:
        dropped = figures.layer_lines(train, "dropped fraction", "dropped_fraction")
        charts.append(("Dropped assignments", dropped))
        names = train[0]["layers"][0]["losses"]
        charts += [
            (f"Router loss: {name}", figures.layer_lines(train, name, "losses", name))
            for name in names
        ]
    return [(title, figures.svg(figure)) for title, figure in charts]


def _loads(records: list[dict[str, Any]]) -> list[str]:
    train = [record for record in records if record["kind"] == "train"]
    layers = train[0]["layers"] if train else []
    return [figures.svg(figures.load_map(train, index)) for index in range(len(layers))]


def _visible(table: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "layer": layer["layer"],
            "experts": [
                [{**token, "piece": token["piece"].translate(_VISIBLE)} for token in expert]
                for expert in layer["experts"]
            ],
        }
        for layer in table.get("layers", [])
    ]


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _main() -> None:
    from moe_jax import cli

    workdir = cli.define_workdir()
    cli.run(lambda: print(write_report(Path(workdir.value))))


if __name__ == "__main__":
    _main()
