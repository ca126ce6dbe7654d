"""Trains a run in its folder: checks, preparation, training, evaluation and report."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from moe_jax import attend, data, processes
from moe_jax.config.experiment import Experiment
from moe_jax.config.unread import unread
from moe_jax.counting import Cost, count
from moe_jax.run import alarms, workdir
from moe_jax.run.finish import finish, has_result, note_divergence
from moe_jax.run.loop import Diverged, Loop
from moe_jax.run.memory import check_memory
from moe_jax.run.predecessors import Sources, open_sources
from moe_jax.run.profile import Window, window_of
from moe_jax.run.released import Released, adopted
from moe_jax.run.session import (
    Session,
    attention_kernels,
    check_streams,
    open_checkpoints,
    open_session,
)
from moe_jax.training.metrics import WANDB
from moe_jax.training.routing_log import check_replay
from moe_jax.training.state import TrainState, named_leaves
from moe_jax.training.wandb_run import check_wandb
from moe_jax.transport import implementation

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Voice:
    """Receivers of a run's messages; only the first of several processes sends messages.

    Attributes:
        say: Function that receives progress, one or several lines at a time.
        warn: Function that receives a warning about a setting.
    """

    say: Say = lambda text: None
    warn: Say = warnings.warn

    def of_first(self) -> Voice:
        """Returns a voice that is silent on every process but the first."""
        return self if processes.is_first() else Voice(warn=lambda text: None)


def train_in(
    folder: Path,
    experiment: Experiment,
    overrides: Mapping[str, Any] | None = None,
    voice: Voice | None = None,
    profile: str | None = None,
    *,
    change: bool = False,
    command: str = "",
) -> tuple[Session, TrainState] | None:
    """Trains an experiment to its last step, from its newest checkpoint if it has one.

    Args:
        folder: Workdir of the run.
        experiment: Configuration of the run.
        overrides: Settings of ``experiment`` that the user gave by dotted name; they take
            precedence over the settings of a released start model.
        voice: Receivers of the run's messages.
        profile: Steps to trace as ``FIRST:END``, without step ``END``; ``None`` traces none.
        change: True continues a run, finished or not, with another number of steps or other rates.
        command: Command line of the run, for its report; "" if a program trains it.

    Returns:
        The session and the last state, or ``None`` if the run was already finished.

    Raises:
        ConfigError: If the configuration cannot run on these devices, or if the folder holds a run
            of another configuration.
        Terminated: After SIGTERM or Ctrl-C, once the state is saved.
        Diverged: After too many consecutive non-finite updates.
        StoppedByAlarm: After an alarm that stops the run, once the state is saved.
        TrainingError: If training cannot continue.
        CheckpointError: If no checkpoint can be read or written.
    """
    voice = (voice or Voice()).of_first()
    experiment = adopted(experiment, folder, overrides or {})
    steps = experiment.training.steps
    window = None if profile is None else window_of(profile, steps)
    sources = _checked(experiment, folder, voice, change)
    with contextlib.ExitStack() as held:
        processes.first(lambda: held.enter_context(workdir.locked(folder)))
        processes.first(lambda: _claim(folder, experiment, sources, voice, change, command))
        return _train(experiment, folder, sources, voice, window)


def check_new(experiment: Experiment) -> None:
    """Makes the checks of a new run that need neither parameters nor files of other runs.

    Raises:
        ConfigError: If the configuration cannot run on these devices.
        FileNotFoundError: If the data does not exist.
        ValueError: If the data does not fit the settings.
    """
    _check_settings(experiment)
    experiment.check_vocabulary(experiment.vocab_size)
    _check_devices(experiment, experiment.vocab_size)


def _check_settings(experiment: Experiment) -> None:
    experiment.check(jax.device_count())
    check_streams(experiment)
    training, layers = experiment.training, experiment.model.sparse_layers()
    mixtures = [(layer.moe.router, layer.moe.num_experts) for layer in layers]
    choices = [(one.select.choices(experts), experts + one.free.count) for one, experts in mixtures]
    check_replay(training.replay_routing, training.steps, choices)
    if WANDB in experiment.training.writers:
        processes.first(check_wandb)


def _check_devices(experiment: Experiment, vocab_size: int) -> None:
    check_memory(experiment, vocab_size)
    attention_kernels(experiment)


def _checked(experiment: Experiment, folder: Path, voice: Voice, change: bool) -> Sources:
    """Makes each check that needs neither parameters nor a workdir, and returns the sources."""
    _check_settings(experiment)
    alarms.references(experiment)
    workdir.check_folder(folder)
    finished = (folder / workdir.RESULT).exists() and not change
    sources = Sources() if finished else open_sources(experiment, folder)
    processes.first(
        lambda: workdir.check_owner(folder, experiment, sources.identities, change=change)
    )
    tokenizer = sources.tokenizer
    vocab_size = tokenizer.vocab_size if tokenizer else experiment.vocab_size
    experiment.check_vocabulary(vocab_size)
    if not finished:
        _check_devices(experiment, vocab_size)
        for line in unread(experiment):
            voice.warn(line)
    return sources


def _train(
    experiment: Experiment,
    folder: Path,
    sources: Sources,
    voice: Voice,
    window: Window | None,
) -> tuple[Session, TrainState] | None:
    workdir.check_shared(folder)
    if has_result(folder):
        voice.say(f"{folder} is finished; its results are in {folder}/report.html")
        if window is not None:
            voice.warn(f"--profile={window} traces no step, because {folder} is finished")
        return None
    processes.first(lambda: sources.keep(folder))
    began = time.perf_counter()
    session = _prepared(experiment, folder, sources, voice)
    cost = count(experiment.model, session.tokenizer.vocab_size, experiment.sequence)
    _announce(session, cost, voice)
    _announce_transports(session, voice)
    _announce_start(sources, session.tokenizer, voice)
    with (
        open_checkpoints(experiment, folder / workdir.CHECKPOINTS) as checkpoints,
        # This context is inside, because closing the checkpoints waits for a process that died.
        processes.together(lambda: _how_to_go_on(checkpoints.latest_step())),
    ):
        loop = Loop(session, checkpoints, folder, say=voice.say, profile=window)
        step, state, position = loop.restore()
        if step:
            voice.say(f"resuming at step {step} of {experiment.training.steps}")
        _warn_of_late_trace(window, step, voice)
        try:
            state = loop.run(step, state, position)
        except Diverged as end:
            note_divergence(folder, end, seconds=time.perf_counter() - began)
            raise
        seconds = time.perf_counter() - began
        lines = finish(session, state, cost, folder, seconds=seconds, lost_lines=loop.lost)
        voice.say(lines)
    return session, state


def _claim(
    folder: Path,
    experiment: Experiment,
    sources: Sources,
    voice: Voice,
    change: bool,
    command: str,
) -> None:
    """Claims the folder for the run, and says which settings change."""
    begun = change and (folder / workdir.CONFIG).exists()
    before = workdir.load(folder) if begun else experiment
    identities = sources.identities
    changed = workdir.claim(folder, experiment, identities, change=change, command=command)
    if changed:
        voice.say("\n".join(changed.lines(before, experiment)))


def _warn_of_late_trace(window: Window | None, step: int, voice: Voice) -> None:
    if window is not None and step >= window.first:
        traced = "no step" if step + 1 not in window else f"the steps from {step + 1} on"
        voice.warn(f"--profile={window}: the run resumes at step {step}, so {traced} is traced")


def _prepared(experiment: Experiment, folder: Path, sources: Sources, voice: Voice) -> Session:
    """Reads the corpus, creates a missing tokenizer and missing rows, and opens the session."""
    processes.first(lambda: _claim_corpus(experiment, folder, voice))
    tokenizer = _tokenizer(experiment, folder, sources)
    experiment.check_vocabulary(tokenizer.vocab_size)
    processes.first(lambda: data.check_dialogues(experiment.data, tokenizer))
    processes.first(lambda: data.prepare_rows(experiment.data, tokenizer))
    return sources.joined(open_session(experiment, tokenizer))


def _claim_corpus(experiment: Experiment, folder: Path, voice: Voice) -> None:
    """Reads the corpus once, so that the run finds corrupt files before compilation."""
    contents = data.read_contents(experiment.data)
    workdir.claim_corpus(folder, dataclasses.asdict(contents))
    voice.say(f"data        {experiment.data.source}: {contents.summary}")
    empty = data.empty_files(experiment.data)
    if empty:
        voice.say(f"            {len(empty):,} empty files are left out, first {empty[0]}")


def _tokenizer(experiment: Experiment, folder: Path, sources: Sources) -> data.Tokenizer:
    """Returns the run's tokenizer; the first start creates it, or copies it from a source."""

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


def _announce(session: Session, cost: Cost, voice: Voice) -> None:
    device = jax.devices()[0]
    hosts = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    mesh = " x ".join(f"{axis}={size}" for axis, size in session.mesh.shape.items())
    kind = f"{jax.device_count()} x {device.device_kind} ({device.platform})"
    training = cost.training_flops_per_token
    voice.say(f"devices     {kind}{hosts}, mesh {mesh}")
    further = f", {cost.lookahead:,} more to look ahead" if cost.lookahead else ""
    voice.say(f"parameters  {cost.total:,} total, {cost.active:,} active per token{further}")
    if session.experiment.frozen_leaves:
        voice.say(_trained(session))
    for stage in session.experiment.frozen_stages:
        spans = stage.spans()
        if spans:
            voice.say(f"frozen      {', '.join(stage.groups)}: {spans}")
    voice.say(f"FLOPs       {cost.flops_per_token:,} forward, {training:,} training, per token")
    voice.say(f"attention   {attend.summary(attention_kernels(session.experiment))}")


def _trained(session: Session) -> str:
    """Returns a line with the number of parameters that the optimizer changes."""
    leaves = named_leaves({"params": session.abstract.params})
    frozen = session.experiment.frozen_leaves
    trained = sum(leaf.size for name, leaf in leaves.items() if name not in frozen)
    every = sum(leaf.size for leaf in leaves.values())
    return f"trained     {trained:,} of {every:,} parameters"


def _announce_transports(session: Session, voice: Voice) -> None:
    """Says how the tokens of each kind of MoE layers travel, and what empty slots cost."""
    experiment, shards = session.experiment, session.mesh.shape["expert"]
    layers = experiment.model.sparse_layers()
    moes = {layer.setting: layer.moe for layer in layers}
    if not moes:
        return
    full, computed = (
        count(experiment.model, session.tokenizer.vocab_size, experiment.sequence, convention)
        for convention in ("full", "computed")
    )
    padding = computed.training_flops_per_token / full.training_flops_per_token - 1
    for setting, moe in moes.items():
        row = implementation(moe, shards)
        why = f", because {row.reason}" if moe.transport == "auto" and row.reason else ""
        voice.say(f"transport   {setting}: {row.transport}, exchange {row.exchange}{why}")
    voice.say(f"padding     empty slots add {padding:.1%} to the FLOPs of a step")


def _announce_start(sources: Sources, tokenizer: data.Tokenizer, voice: Voice) -> None:
    start = sources.start
    if not isinstance(start, Released):
        return
    own = "its own tokenizer" if start.tokenizer else "the tokenizer of the config"
    voice.say(f"start       {start.found.family} of {start.folder}, with {own}")
    if tokenizer.vocab_size > sources.rows:
        added = tokenizer.vocab_size - sources.rows
        rows = f"{sources.rows:,} rows of the start, {added:,} drawn ones after them"
        voice.say(f"embedding   {rows}")
