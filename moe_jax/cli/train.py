"""Trains: ``python -m moe_jax.train --config=configs/quickstart.py --workdir=runs/quickstart``."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from pathlib import Path

import jax
from absl import flags

from moe_jax import data, processes, signals
from moe_jax.cli import common
from moe_jax.config.experiment import Experiment
from moe_jax.config.unread import unread
from moe_jax.counting import Cost, count
from moe_jax.run import workdir
from moe_jax.run.finish import finish, has_result, note_divergence
from moe_jax.run.loop import Diverged, Loop, Terminated
from moe_jax.run.memory import check_memory
from moe_jax.run.predecessors import Sources, open_sources
from moe_jax.run.released import adopted
from moe_jax.run.session import Session, check_streams, open_checkpoints, open_session
from moe_jax.training.routing_log import check_replay

_GO_ON = "run the same command to go on"


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    common.define_config(values)
    common.define_workdir(values)
    common.define_hosts(values)


def main(given: flags.FlagValues) -> None:
    """Checks, prepares, trains, evaluates and reports."""
    signals.advise(_GO_ON)
    common.join_hosts(given)
    experiment = common.experiment_of(given)
    folder = common.folder_of(given)
    experiment = adopted(experiment, folder, common.overrides_of(given))
    experiment.check(jax.device_count())
    check_streams(experiment)
    check_replay(experiment.training.replay_routing, experiment.training.steps)
    workdir.check_folder(folder)
    sources = open_sources(experiment, folder)
    processes.first(lambda: workdir.check_owner(folder, experiment, sources.identities))
    given = sources.tokenizer
    vocab_size = given.vocab_size if given else experiment.vocab_size
    experiment.check_vocabulary(vocab_size)
    if not (folder / workdir.RESULT).exists():
        check_memory(experiment, vocab_size)
        for line in unread(experiment):
            _warn(line)
    with contextlib.ExitStack() as held:
        processes.first(lambda: held.enter_context(workdir.locked(folder)))
        _train(experiment, folder, sources)


def _train(experiment: Experiment, folder: Path, sources: Sources) -> None:
    processes.first(lambda: workdir.claim(folder, experiment, sources.identities))
    workdir.check_shared(folder)
    if has_result(folder):
        _say(f"{folder} is finished; its results are in {folder}/report.html")
        return
    processes.first(lambda: sources.keep(folder))
    began = time.perf_counter()
    processes.first(lambda: _claim_corpus(experiment, folder))
    tokenizer = _tokenizer(experiment, folder, sources)
    experiment.check_vocabulary(tokenizer.vocab_size)
    processes.first(lambda: data.prepare_rows(experiment.data, tokenizer))
    session = sources.joined(open_session(experiment, tokenizer))
    cost = count(experiment.model, tokenizer.vocab_size, experiment.sequence)
    _announce(session, cost)
    _announce_start(sources, tokenizer)
    with (
        open_checkpoints(experiment, folder / workdir.CHECKPOINTS) as checkpoints,
        # Inside: closing the checkpoints would wait for the process that is gone.
        processes.together(lambda: _how_to_go_on(checkpoints.latest_step())),
    ):
        loop = Loop(session, checkpoints, folder)
        step, state, position = loop.restore()
        if step:
            _say(f"resuming at step {step} of {experiment.training.steps}")
        try:
            state = loop.run(step, state, position)
        except Terminated as stop:
            _say(f"{stop}; {_GO_ON}")
            sys.exit(stop.code)
        except Diverged as end:
            note_divergence(folder, end, seconds=time.perf_counter() - began)
            raise
        seconds = time.perf_counter() - began
        finish(session, state, cost, folder, seconds=seconds, lost_lines=loop.lost)


def _claim_corpus(experiment: Experiment, folder: Path) -> None:
    """Reads the corpus once, so that damage is found before anything is compiled."""
    contents = data.read_contents(experiment.data)
    workdir.claim_corpus(folder, dataclasses.asdict(contents))
    _say(
        f"data        {experiment.data.source}: {contents.training:,} documents for training, "
        f"{contents.validation:,} for validation, SHA-256 {contents.sha256[:12]}"
    )


def _tokenizer(experiment: Experiment, folder: Path, sources: Sources) -> data.Tokenizer:
    """The tokenizer of the run, made or taken over at its first start and kept in its folder."""

    def make() -> None:
        try:
            data.load_tokenizer(folder)
        except FileNotFoundError:
            tokenizer = sources.tokenizer or data.open_tokenizer(experiment.data)
            data.with_spare_ids(tokenizer, sources.rows).save(folder)

    processes.first(make)
    return data.load_tokenizer(folder)


def _how_to_go_on(saved: int | None) -> str:
    where = "from the start" if saved is None else f"from checkpoint {saved}"
    return f"start all processes again with the same command to go on {where}"


def _say(text: str) -> None:
    if processes.is_first():
        print(text, flush=True)


def _warn(text: str) -> None:
    if processes.is_first():
        print(f"warning: {text}", file=sys.stderr, flush=True)


def _announce(session: Session, cost: Cost) -> None:
    device = jax.devices()[0]
    hosts = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    mesh = " x ".join(f"{axis}={size}" for axis, size in session.mesh.shape.items())
    kind = f"{jax.device_count()} x {device.device_kind} ({device.platform})"
    training = cost.training_flops_per_token
    _say(f"devices     {kind}{hosts}, mesh {mesh}")
    further = f", {cost.lookahead:,} more to look ahead" if cost.lookahead else ""
    _say(f"parameters  {cost.total:,} total, {cost.active:,} active per token{further}")
    _say(f"FLOPs       {cost.flops_per_token:,} forward, {training:,} training, per token")


def _announce_start(sources: Sources, tokenizer: data.Tokenizer) -> None:
    if not sources.rows:
        return
    start = sources.start
    own = "its own tokenizer" if start.tokenizer else "the tokenizer of the config"
    _say(f"start       {start.found.family} of {start.folder}, with {own}")
    if tokenizer.vocab_size > sources.rows:
        added = tokenizer.vocab_size - sources.rows
        _say(f"embedding   {sources.rows:,} rows of the start, {added:,} drawn ones after them")


if __name__ == "__main__":
    common.run(define, main)
