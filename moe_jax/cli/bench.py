"""Compares data loader and training: ``moe-jax bench --config=quickstart``.

The command prints one JSON line: tokens per second of the data loader alone, tokens per second of
training steps on one batch, and their ratio. One process measures both in alternating rounds.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import jax
from absl import flags

from moe_jax import data, files
from moe_jax.cli import common
from moe_jax.run.session import Session, open_session


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    common.define_config(values)
    flags.DEFINE_string("output", None, "Also write the JSON to this file.", flag_values=values)
    flags.DEFINE_integer(
        "rounds", 5, "Number of alternating rounds.", lower_bound=1, flag_values=values
    )
    flags.DEFINE_integer(
        "steps", 5, "Number of training steps per round.", lower_bound=1, flag_values=values
    )


def main(given: flags.FlagValues) -> None:
    """Measures loader and training, and prints the rates."""
    if given.output:
        files.check_file(Path(given.output), "--output")
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
