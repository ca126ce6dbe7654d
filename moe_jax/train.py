"""Trains: ``python -m moe_jax.train --config=configs/quickstart.py --workdir=runs/quickstart``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import jax

from moe_jax import cli, data, workdir
from moe_jax.errors import ConfigError
from moe_jax.experiment import Experiment
from moe_jax.planning import Cost, count
from moe_jax.training.finish import finish
from moe_jax.training.loop import Loop, Terminated
from moe_jax.training.session import Session, open_checkpoints, open_session

_CONFIG = cli.define_config()
_WORKDIR = cli.define_workdir()


def main() -> None:
    """Checks, prepares, trains, evaluates and reports."""
    experiment = cli.experiment_of(_CONFIG)
    if not _WORKDIR.value:
        raise ConfigError("--workdir is empty; try --workdir=runs/quickstart")
    folder = Path(_WORKDIR.value)
    experiment.check(jax.device_count())
    workdir.claim(folder, experiment)
    if (folder / workdir.RESULT).exists():
        print(f"{folder} is finished; its results are in {folder}/report.html")
        return
    began = time.perf_counter()
    tokenizer = _tokenizer(experiment, folder)
    session = open_session(experiment, tokenizer)
    cost = count(experiment.model, tokenizer.vocab_size, experiment.sequence)
    _announce(session, cost)
    with open_checkpoints(experiment, folder / workdir.CHECKPOINTS) as checkpoints:
        loop = Loop(session, checkpoints, folder)
        step, state, position = loop.restore()
        if step:
            print(f"resuming at step {step} of {experiment.training.steps}", flush=True)
        try:
            state = loop.run(step, state, position)
        except Terminated as stop:
            print(f"{stop}; run the same command to go on", flush=True)
            sys.exit(0)
    finish(session, state, cost, folder, seconds=time.perf_counter() - began)


def _tokenizer(experiment: Experiment, folder: Path) -> data.Tokenizer:
    """The tokenizer of the run, made at its first start and kept in its folder."""
    try:
        return data.load_tokenizer(folder)
    except FileNotFoundError:
        tokenizer = data.open_tokenizer(experiment.data)
        tokenizer.save(folder)
        return tokenizer


def _announce(session: Session, cost: Cost) -> None:
    device = jax.devices()[0]
    mesh = " x ".join(f"{axis}={size}" for axis, size in session.mesh.shape.items())
    kind = f"{jax.device_count()} x {device.device_kind} ({device.platform})"
    training = cost.training_flops_per_token
    print(f"devices     {kind}, mesh {mesh}")
    further = f", {cost.lookahead:,} more to look ahead" if cost.lookahead else ""
    print(f"parameters  {cost.total:,} total, {cost.active:,} active per token{further}")
    print(f"FLOPs       {cost.flops_per_token:,} forward, {training:,} training, per token")
    sys.stdout.flush()


if __name__ == "__main__":
    cli.run(main)
