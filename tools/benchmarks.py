"""Runs the benchmarks of a CPU and writes their rows, and a table of them against the targets.

``python -m tools.benchmarks`` runs ``moe-jax bench`` for every entry of ``RUNS``, one at a time. It
writes ``experiments/benchmarks/NAME.jsonl`` with a figure, and the table of
``docs/benchmarks.md``. ``--only=steps`` makes only runs whose name contains ``steps``; ``--only=``
runs nothing and writes the table of the existing rows. Nothing else should run meanwhile.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from moe_jax.cli import common
from moe_jax.run.shares import LARGE_PAGES
from tools.plans import write_table

FOLDER = Path("experiments/benchmarks")
_MARKS = ("<!-- targets -->\n", "<!-- end of targets -->")
_SCALING = ",".join(f"scaling_e{2**power}" for power in range(1, 9))
_OURS = "moe_jax/ragged/loop,moe_jax/gather/capacity_1"
RUNS = {
    "cpu_layers": (
        "--shapes=laptop_e8,laptop_e64",
        "--parts=experts",
        f"--candidates={_OURS},transformers,torch",
    ),
    "cpu_scaling": (
        f"--shapes={_SCALING}",
        "--parts=experts",
        "--regimes=balanced",
        f"--candidates={_OURS}",
    ),
    "cpu_steps": ("--parts=step",),
}
_ROUNDS = 7
_DROPLESS, _CAPACITY, _PEERS = "moe_jax/ragged/loop", "moe_jax/gather/capacity_1", "transformers/"


@dataclasses.dataclass(frozen=True)
class Rows:
    """A selection of rows, of which the fastest counts.

    Attributes:
        run: Name of the run.
        name: Name of the candidate, or the start of several names if it ends with a slash.
        direction: Direction.
        shape: Name of the shape.
        regime: Routing regime.
    """

    run: str
    name: str
    direction: str
    shape: str
    regime: str = "balanced"

    def best(self, folder: Path) -> dict[str, Any] | None:
        """Returns the row with the largest share of the ceiling, or ``None`` if there is none."""
        path = folder / f"{self.run}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        found = [
            row
            for row in map(json.loads, lines)
            if row["p50"] is not None and self._names(row["name"])
            if (row["direction"], row["shape"], row["regime"])
            == (self.direction, self.shape, self.regime)
        ]
        return max(found, key=lambda row: row["ceiling_share"], default=None)

    def _names(self, name: str) -> bool:
        return name.startswith(self.name) if self.name.endswith("/") else name == self.name


@dataclasses.dataclass(frozen=True)
class Target:
    """A ratio of two times on the same number of FLOPs.

    Attributes:
        what: The ratio in words.
        ours: Rows of this package.
        beside: Rows that they are compared with.
        most: Largest ratio that meets the target.
    """

    what: str
    ours: Rows
    beside: Rows
    most: float

    def ratio(self, folder: Path) -> float | None:
        """Returns the ratio of times, each relative to a matrix product in the same rounds."""
        ours, beside = self.ours.best(folder), self.beside.best(folder)
        if ours is None or beside is None:
            return None
        return float(beside["ceiling_share"] / ours["ceiling_share"])


def _targets() -> list[Target]:
    found = []
    for shape in ("laptop_e8", "laptop_e64"):
        for direction, least in (("forward", 0.85), ("forward_backward", 0.9)):
            peers = Rows("cpu_layers", _PEERS, direction, shape)
            for kind, name, most in (
                ("capacity 1", _CAPACITY, least),
                ("dropless", _DROPLESS, 1.0),
            ):
                ours = dataclasses.replace(peers, name=name)
                what = f"{kind}, {shape}, {direction} / best of transformers"
                found.append(Target(what, ours, peers, most))
            even = dataclasses.replace(peers, name=_DROPLESS)
            skewed = dataclasses.replace(even, regime="zipf")
            what = f"dropless, {shape}, {direction}, Zipf / balanced"
            found.append(Target(what, skewed, even, 1.2))
    for kind, name in (("capacity 1", _CAPACITY), ("dropless", _DROPLESS)):
        two = Rows("cpu_scaling", name, "forward_backward", "scaling_e2")
        for experts in (128, 256):
            many = dataclasses.replace(two, shape=f"scaling_e{experts}")
            what = f"{kind}, Switch layer, forward_backward, {experts} experts / 2 experts"
            found.append(Target(what, many, two, 1.3))
    peers = Rows("cpu_steps", _PEERS, "step", "mixtral_step", "router")
    for way, most in (("auto/capacity_1.25", 0.7), ("auto", 0.9)):
        ours = dataclasses.replace(peers, name=f"moe_jax/{way}")
        found.append(Target(f"train step, {way} / best of transformers", ours, peers, most))
    return found


TARGETS = _targets()


def table(folder: Path) -> str:
    """Returns the table of all targets and the ratios of the existing rows."""
    lines = ["| ratio of times | target | measured | met |\n", "|---|---|---|---|\n"]
    for target in TARGETS:
        ratio = target.ratio(folder)
        cells = (
            ("", "") if ratio is None else (f"{ratio:.2f}", "yes" if ratio <= target.most else "no")
        )
        lines.append(f"| {target.what} | {target.most:g} | {cells[0]} | {cells[1]} |\n")
    return "".join(lines)


def run(name: str, arguments: Sequence[str], folder: Path) -> None:
    """Runs one benchmark in a process of its own, which writes its rows and its figure."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "moe_jax.bench", *arguments, f"--rounds={_ROUNDS}"]
    command += [f"--output={folder / name}.jsonl", f"--figure={folder / name}.png"]
    subprocess.run(command, check=True, env=os.environ | LARGE_PAGES)


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string(
        "only", None, "Make only runs whose name contains this text.", flag_values=values
    )
    flags.DEFINE_string("folder", str(FOLDER), "Folder of the rows.", flag_values=values)
    flags.DEFINE_string(
        "page", "docs/benchmarks.md", "Page that shows the table.", flag_values=values
    )


def main(given: flags.FlagValues) -> None:
    """Runs the benchmarks and writes the table."""
    folder = Path(given.folder)
    for name, arguments in RUNS.items():
        if given.only is None or (given.only and given.only in name):
            print(f"{name} ...", flush=True)
            run(name, arguments, folder)
    write_table(Path(given.page), table(folder), _MARKS)


if __name__ == "__main__":
    common.run(define, main)
