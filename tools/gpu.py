"""Runs everything that needs a GPU, in eight minutes, and writes one JSON file per device.

``make gpu`` or ``python -m tools.gpu`` checks and measures the kernels, attention, layers beside
other libraries and train steps, trains the quickstart with a profile, and runs one ablation at the
scale ``gpu``. Each part is a process with a time limit. A part that fails or runs out of time is
recorded with its last lines, and the next part runs. ``--rehearse`` runs the same parts at the
smallest sizes on the devices that are there. The host needs no network: see ``docs/speed.md``.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from moe_jax.cli import common
from moe_jax.files import write_json

_LINES = 20


@dataclasses.dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        name: Name of the part.
        command: Arguments of ``python -m``; ``{folder}`` is the folder of the part's files.
        small: Further arguments of a rehearsal.
        seconds: Time limit.
        results: Files in the folder, of one JSON object per line, that the report includes.
    """

    name: str
    command: Sequence[str]
    small: Sequence[str]
    seconds: int
    results: Sequence[str] = ("rows.jsonl",)


def _bench(*arguments: str) -> tuple[str, ...]:
    return ("moe_jax.bench", "--output={folder}/rows.jsonl", *arguments)


_SHAPES = "--shapes=qwen3_30b_a3b,mixtral_8x7b,sonic_30b_n1024"
_TINY = ("--shapes=tiny", "--rounds=1")
_METRICS = ("run/metrics.jsonl",)
PARTS = (
    *(
        Part(
            f"kernels_{dtype}",
            _bench(
                "--shapes=uneven",
                "--parts=experts",
                "--candidates=moe_jax",
                f"--dtype={dtype}",
                "--rounds=3",
            ),
            (*_TINY, "--regimes=zipf,empty"),
            40,
        )
        for dtype in ("float32", "bfloat16")
    ),
    Part(
        "products",
        _bench("--shapes=qwen3_30b_a3b,mixtral_8x7b", "--parts=products", "--dtype=bfloat16"),
        _TINY,
        50,
    ),
    Part(
        "attention",
        _bench("--parts=attention", "--dtype=bfloat16", "--rounds=10"),
        ("--rounds=1", "--directions=forward"),
        50,
    ),
    Part(
        "layers",
        _bench(_SHAPES, "--parts=experts", "--dtype=bfloat16", "--regimes=balanced,zipf"),
        (*_TINY, "--regimes=zipf", "--candidates=moe_jax/gather"),
        110,
    ),
    Part(
        "train_step",
        _bench("--parts=step", "--dtype=bfloat16"),
        # CPUs multiply bfloat16 slowly.
        ("--rounds=1", "--candidates=moe_jax/auto/capacity", "--dtype=float32"),
        50,
    ),
    Part(
        "quickstart",
        (
            "moe_jax.train",
            "--config=quickstart",
            "--workdir={folder}/run",
            "--profile=5:8",
            "--config.training.steps=200",
        ),
        ("--config.training.steps=10", "--config.data.eval_documents=2"),
        50,
        _METRICS,
    ),
    Part(
        "ablation",
        (
            "moe_jax.ablate",
            "--ablation=switch/capacity_factor",
            "--scale=gpu",
            "--seeds=1",
            "--arms=dense,switch_1.25",
            "--steps=60",
            "--workdir={folder}/runs",
            "--output={folder}/report",
        ),
        ("--scale=cpu", "--steps=2"),
        90,  # with the tokens of all installed packages
        ("report/results.jsonl",),
    ),
)


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_bool("rehearse", False, "Run the smallest sizes, anywhere.", flag_values=values)
    flags.DEFINE_list("only", [], "Names of parts to run; all by default.", flag_values=values)
    flags.DEFINE_string(
        "output", "experiments/benchmarks", "Folder of the JSON file.", flag_values=values
    )


def main(given: flags.FlagValues) -> None:
    """Runs the parts and writes ``OUTPUT/DEVICE.json``."""
    device = _device()
    if device["platform"] not in ("gpu", "cuda") and not given.rehearse:
        common.say(f"error: no GPU here, but {device['kind']}: --rehearse runs the smallest sizes")
        sys.exit(2)
    report: dict[str, Any] = {"device": device["kind"], "commit": _commit(), "parts": {}}
    name = re.sub(r"[^a-z0-9]+", "_", device["kind"].lower()).strip("_")
    file = Path(given.output) / f"{name}.json"
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            if given.only and part.name not in given.only:
                continue
            place = Path(folder) / part.name
            place.mkdir()
            report["parts"][part.name] = found = run(part, place, given.rehearse)
            common.say(f"{part.name:16} {found['seconds']:6.1f} s  {found['outcome']}")
            write_json(file, report)
    if any(found["outcome"] != "done" for found in report["parts"].values()):
        sys.exit(1)


def run(part: Part, folder: Path, rehearse: bool) -> dict[str, Any]:
    """Runs one part and returns its command, seconds, outcome and results."""
    arguments = [*part.command, *(part.small if rehearse else ())]
    command = [text.format(folder=folder) for text in arguments]
    began = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-m", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=None if rehearse else part.seconds,
        )
        outcome = "done" if done.returncode == 0 else f"exit status {done.returncode}"
        said = done.stdout
    except subprocess.TimeoutExpired as late:
        outcome = f"not done after {part.seconds} s"
        said = (late.stdout or b"").decode(errors="replace")
    found = {
        "command": " ".join(arguments),
        "seconds": round(time.perf_counter() - began, 1),
        "outcome": outcome,
        "results": [line for name in part.results for line in _lines(folder / name)],
    }
    return found if outcome == "done" else found | {"last_lines": said.splitlines()[-_LINES:]}


def _lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _device() -> dict[str, str]:
    """Returns platform and kind of the first device, found in a process that then frees it."""
    code = "import jax; d = jax.devices()[0]; print(d.platform, d.device_kind, sep='|')"
    said = subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()[-1]
    return dict(zip(("platform", "kind"), said.split("|"), strict=True))


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


if __name__ == "__main__":
    common.run(define, main)
