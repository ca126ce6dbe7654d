"""Measures MoE layers: ``moe-jax bench --shapes=laptop_e8 --output=bench.jsonl``.

The command measures the transports and backends of this package and layers of other libraries on
the same weights, tokens and routing, in interleaved rounds. It prints a table and writes one JSON
line per row. The part ``step`` is a whole train step of a small Mixtral. With ``--config`` the
command compares data loader and training instead: it prints one JSON line with the tokens per
second of the data loader alone, those of training steps on one batch, and their ratio.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from moe_jax import data, files
from moe_jax.benchmark import attention, layers, peers, products, report, steps
from moe_jax.benchmark.candidate import Candidate
from moe_jax.benchmark.given import REGIMES, problem
from moe_jax.benchmark.measure import DIRECTIONS, TOLERANCE, Measurement
from moe_jax.benchmark.measure import measure as layer_rows
from moe_jax.benchmark.shapes import Shape, shape
from moe_jax.cli import common
from moe_jax.errors import ConfigError
from moe_jax.run.session import Session, open_session

_OF_SHAPES = ("experts", "layer")
_PARTS = (*_OF_SHAPES, products.PRODUCTS, attention.ATTENTION, steps.STEP)


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    common.define_config(values)
    _define_layers(values)
    flags.DEFINE_string("output", None, "Also write the JSON to this file.", flag_values=values)
    flags.DEFINE_integer(
        "rounds", 5, "Number of alternating rounds.", lower_bound=1, flag_values=values
    )
    flags.DEFINE_integer(
        "steps", 5, "Number of training steps per round.", lower_bound=1, flag_values=values
    )


def _define_layers(values: flags.FlagValues) -> None:
    texts = {
        "shapes": ("laptop_e8", "Names of shapes of moe_jax/benchmark/shapes.json."),
        "regimes": (",".join(REGIMES), "Routing regimes of the experts."),
        "directions": (",".join(DIRECTIONS), "Directions to measure."),
        "parts": (
            ",".join(_OF_SHAPES),
            "Experts with a given routing, the layer with its router, grouped products alone, "
            "attention, or a train step.",
        ),
        "candidates": ("", "Starts of names of candidates; empty for all of them."),
    }
    for name, (default, text) in texts.items():
        flags.DEFINE_list(name, default, text, flag_values=values)
    flags.DEFINE_enum("dtype", "float32", [*TOLERANCE], "Type of numbers.", flag_values=values)
    flags.DEFINE_integer(
        "empty", 1, "Experts without tokens in the regime empty.", lower_bound=1, flag_values=values
    )
    flags.DEFINE_string(
        "figure", None, "Also draw the shares of the ceiling, SVG or PNG.", flag_values=values
    )
    flags.DEFINE_string(
        "baseline", None, "Lines of an earlier run, to fail if a row is slower.", flag_values=values
    )


def main(given: flags.FlagValues) -> None:
    """Measures layers, or loader and training with ``--config``, and prints the rates."""
    if given.output:
        files.check_file(Path(given.output), "--output")
    flag: Any = given["config"]
    (_loader if flag.present else _layers)(given)


def _layers(given: flags.FlagValues) -> None:
    """Measures layers; exits with code 1 if a row misses its baseline."""
    chosen = [shape(name) for name in given.shapes]
    _check_names("--regimes", given.regimes, REGIMES)
    _check_names("--directions", given.directions, DIRECTIONS)
    _check_names("--parts", given.parts, _PARTS)
    every = _candidates(given.candidates)
    baseline = report.read_baseline(Path(given.baseline)) if given.baseline else {}
    if given.figure:
        if Path(given.figure).suffix not in ("", ".png", ".svg"):
            raise ConfigError(f"--figure={given.figure} is neither .png nor .svg: use one of them")
        files.check_file(Path(given.figure), "--figure")
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    rows: list[Measurement] = []
    for group in _groups(chosen, every, given):
        rows += group
        if given.output:  # at once, so that a run which is stopped loses no row
            with files.replaced(Path(given.output)) as temporary:
                temporary.write_text(report.lines(rows, device))
    print(report.table(rows))
    if given.figure:
        report.draw(rows, Path(given.figure))
    late = report.slower(rows, baseline)
    if late:
        more = f", and {len(late) - 1} more rows" if len(late) > 1 else ""
        print(f"slower than --baseline: {late[0]}{more}", file=sys.stderr)
        sys.exit(1)


def _groups(
    chosen: Sequence[Shape], every: Sequence[Candidate], given: flags.FlagValues
) -> Iterator[list[Measurement]]:
    """Measures and yields groups of rows; the routing of a layer's own router has no regimes."""
    starts, dtype, rounds = tuple(given.candidates), given.dtype, given.rounds
    for one, part in itertools.product(chosen, given.parts):
        mine = [candidate for candidate in every if candidate.part == part]
        regimes = given.regimes if part == "experts" else given.regimes[:1]
        for regime in regimes if part in _OF_SHAPES else ():
            routed = problem(one, regime, dtype, empty=given.empty)
            yield layer_rows(routed, mine, part, given.directions, rounds)
    for one in chosen if products.PRODUCTS in given.parts else ():
        yield products.measure_products(one, starts, dtype, rounds)
    if attention.ATTENTION in given.parts:
        yield attention.measure_attention(starts, dtype, given.directions, rounds)
    if steps.STEP in given.parts:
        yield steps.measure_steps(starts, dtype, rounds)


def _check_names(flag: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names or [""]:
        if name not in known:
            raise ConfigError(f"{flag} has no {name!r}: use {', '.join(known)}")


def _candidates(starts: Sequence[str]) -> list[Candidate]:
    """Returns the candidates whose names begin with one of ``starts``; all without ``starts``."""
    every = [*layers.candidates(), *peers.candidates()]
    others = (*products.candidates(), *attention.NAMES, *steps.NAMES)
    names = list(dict.fromkeys([*(candidate.name for candidate in every), *others]))
    for start in starts:
        if not any(name.startswith(start) for name in names):
            raise ConfigError(f"--candidates: no name starts with {start!r}: {', '.join(names)}")
    return [one for one in every if not starts or one.name.startswith(tuple(starts))]


def _loader(given: flags.FlagValues) -> None:
    """Measures loader and training, and prints the rates."""
    experiment = common.experiment_of(given)
    experiment.check(jax.device_count())
    session = open_session(experiment, data.open_tokenizer(experiment.data))
    loader, training = measure(session, rounds=given.rounds, steps=given.steps)
    result = {
        "name": experiment.name,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "loader_tokens_per_second": loader,
        "training_tokens_per_second": training,
        "ratio": statistics.median(a / b for a, b in zip(loader, training, strict=True)),
    }
    line = json.dumps(result)
    if given.output:
        with files.replaced(Path(given.output)) as temporary:
            temporary.write_text(line + "\n")
    print(line)


def measure(session: Session, *, rounds: int, steps: int) -> tuple[list[float], list[float]]:
    """Returns tokens per second of the loader and of training, as one list of rounds each."""
    config = session.experiment.data
    tokens = session.experiment.tokens_per_step
    _, state = session.recipe.create()
    batches = data.train_batches(config, session.tokenizer)
    batch = session.place(next(batches))
    batches.close()
    loader, training = [], []
    with jax.set_mesh(session.mesh):
        state, _ = session.train_step(state, batch)
        for _ in range(rounds):
            loader.append(data.measure_throughput(config, seconds=1.0))
            jax.block_until_ready(state)
            began = time.perf_counter()
            for _ in range(steps):
                state, _ = session.train_step(state, batch)
            jax.block_until_ready(state)
            training.append(steps * tokens / (time.perf_counter() - began))
    return loader, training


if __name__ == "__main__":
    common.run(define, main)
