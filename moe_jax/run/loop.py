"""Training loop of a run: restores, steps, logs, saves and stops."""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from moe_jax import data, processes, signals
from moe_jax.counting import count
from moe_jax.errors import CheckpointError, TrainingError
from moe_jax.monitor import Watch
from moe_jax.planning.topology import peak_of
from moe_jax.run.alarms import open_watch
from moe_jax.run.profile import PROFILE, Profiler, Window
from moe_jax.run.session import Batch, Session
from moe_jax.training.average import with_average
from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.history import LOG, TOKENIZER, VALIDATIONS, Logged, digest, spans, split
from moe_jax.training.metrics import (
    MetricsWriter,
    ProgressBar,
    eval_record,
    printed,
    read_metrics,
    train_record,
)
from moe_jax.training.optimizer import learning_rate
from moe_jax.training.routing_log import ROUTING, RoutingRecord
from moe_jax.training.state import (
    TrainState,
    finite_leaves,
    from_named_leaves,
    named_leaves,
)
from moe_jax.training.step import StepReport
from moe_jax.training.validations import Validations

# One small program; each operation of its own would be compiled for a second or two.
_compiled_rate = jax.jit(learning_rate, static_argnums=(0, 2))

_finite_leaves = jax.jit(finite_leaves)


class Diverged(TrainingError):
    """Loss, gradient or update stayed non-finite for too many steps.

    Attributes:
        step: Last step with a finite update; the run keeps its parameters.

    Examples:
        >>> import moe_jax as mj
        >>> try:
        ...     raise mj.Diverged("10 non-finite updates in a row", step=120)
        ... except mj.Diverged as end:
        ...     print(end.step)
        120
    """

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class StoppedByAlarm(TrainingError):
    """An alarm of ``training.alarms`` stopped the run, and the state was saved."""


class Terminated(Exception):
    """A signal stopped the run, and the state was saved.

    Attributes:
        code: Exit code of the process. It is 0 after SIGTERM, because a preempted run that saved
            its state is a success for the scheduler, and 130 after Ctrl-C, so that a script does
            not take the run for finished.
    """

    def __init__(self, number: int, step: int):
        super().__init__(
            f"stopped by {signals.NAMES[signal.Signals(number)]} at step {step}, which is saved"
        )
        self.code = 0 if number == signal.SIGTERM else signals.Interrupted(number).code


@dataclasses.dataclass
class Loop:
    """A run in progress.

    Attributes:
        session: Experiment on its devices.
        checkpoints: Store of the run's checkpoints.
        workdir: Folder of the run, for metrics.
        lost: Description of the lines that the log has lost, or "".
        say: Function that receives progress lines if no terminal can show a bar.
        profile: Steps to trace, or ``None``.
        validations: Validations so far.
    """

    session: Session
    checkpoints: Checkpoints
    workdir: Path
    lost: str = ""
    say: Callable[[str], None] = printed
    profile: Window | None = None
    validations: Validations = dataclasses.field(default=Validations(), init=False)
    _saved: int | None = dataclasses.field(default=None, init=False)

    def restore(self, step: int | None = None) -> tuple[int, TrainState, dict[str, Any] | None]:
        """Returns step, state and data position of the newest intact checkpoint, or of a step.

        A run without a checkpoint gets step 0, its first state and no data position.

        Raises:
            CheckpointError: If every checkpoint is corrupt, or if the tokenizer in the folder is
                not the tokenizer of the checkpoint.
        """
        found = self.checkpoints.restore(named_leaves(self.session.abstract), step=step)
        if found is None:
            first = self.session.first_state
            return 0, self.session.recipe.create()[1] if first is None else first(), None
        step, leaves, data_state = found
        if split(data_state)[1].get(TOKENIZER, self._tokenizer) != self._tokenizer:
            raise CheckpointError(
                f"the tokenizer in {self.workdir} is not the tokenizer of checkpoint {step}: "
                "restore its files from a backup, or delete them to train it again on the same data"
            )
        self._saved = step
        return step, from_named_leaves(self.session.abstract, leaves), data_state

    def run(self, start: int, state: TrainState, data_state: dict[str, Any] | None) -> TrainState:
        """Trains to the last step, or to the step at which the validations stop it early.

        Raises:
            Terminated: After SIGTERM or Ctrl-C, once the state is saved.
            Interrupted: If the signal arrives before the first step.
            Diverged: After too many consecutive non-finite updates.
            StoppedByAlarm: After an alarm that stops the run, once the state is saved.
            TrainingError: If the first state holds non-finite numbers.
            CheckpointError: If a checkpoint cannot be written.
        """
        self._require_good_start(start, state)
        training = self.session.experiment.training
        batches, logged = self._batches(data_state)
        self.validations = self._validated(start, data_state)
        steps = training.steps
        with (
            MetricsWriter(self.workdir, start, logged, training.writers) as writer,
            ProgressBar(start, steps, say=self.say) as bar,
            _stopping() as stopping,
            Profiler(self.workdir / PROFILE, self.profile).open() as profiler,
            jax.set_mesh(self.session.mesh),
        ):
            self.lost = writer.lost
            self._warn_of_lost_routing(start)
            watch = open_watch(self.session.experiment, self.workdir, start)
            log = _Log(self.session, writer, bar, watch)
            guard = _Guard(training.max_skipped_updates)
            for step in () if self._ends_early() else range(start + 1, steps + 1):
                batch = self._with_record(step, self.session.place(next(batches)))
                with profiler.step(step) as results:
                    state, report = self.session.train_step(state, batch)
                    results.append(report)
                stopping.begin()
                if training.record_routing:
                    self._record(step, batch, report)
                self._look(guard, step, report)
                log.step(step, report)
                if self._due(step, training.eval_every) and step < steps:
                    self._validate(step, state, log)
                stop = stopping.came(step)
                if self._saves(step) or stop or log.alarm:
                    self._save(step, state, batches, writer.logged)
                self.checkpoints.check()
                if stop:
                    self.checkpoints.wait()
                    raise Terminated(stop, step)
                if log.alarm:
                    self.checkpoints.wait()
                    raise StoppedByAlarm(_stopped(step, log.alarm))
                if self._ends_early():
                    break
            self._look(guard, steps, None)
        if self._ends_early():
            self.say(f"training ends early at step {int(state.step)}: {self.validations}")
        self.checkpoints.wait()
        batches.close()
        return state

    def _batches(self, data_state: dict[str, Any] | None) -> tuple[Any, Logged | None]:
        """Returns the batches that follow a data position, and the steps logged before it."""
        session = self.session
        batches = data.train_batches(
            session.experiment.data, session.tokenizer, rows=session.rows.tolist()
        )
        if data_state is None:
            return batches, None
        position, notes = split(data_state)
        if position:  # A checkpoint of step 0 has no position: no batch is consumed.
            batches.set_state(position)
        return batches, Logged(notes[LOG]) if LOG in notes else None

    @property
    def record(self) -> RoutingRecord:
        """Record of the run's routing, in its folder."""
        return RoutingRecord(self.workdir / ROUTING)

    def _with_record(self, step: int, batch: Batch) -> Batch:
        replay = self.session.experiment.training.replay_routing
        if not replay:
            return batch
        choices = RoutingRecord(Path(replay)).read(step, self._tokens(batch))
        local = tuple(layer[self.session.rows] for layer in choices)
        return {**batch, **self.session.place({"routing": local})}

    def _record(self, step: int, batch: Batch, report: StepReport) -> None:
        tokens = self._tokens(batch)
        if processes.is_first():
            choices = [np.asarray(layer) for layer in report.choices if layer is not None]
            self.record.write(step, tokens, choices)

    def _tokens(self, batch: Batch) -> dict[str, np.ndarray]:
        return {"inputs": self.session.whole(batch["inputs"])}

    def _look(self, guard: _Guard, step: int, report: StepReport | None) -> None:
        try:
            guard.look(step, report)
        except Diverged as error:
            self.checkpoints.wait()
            # The run restored or wrote this checkpoint; a newer one in the folder is corrupt.
            saved = self._saved
            last = (
                "no checkpoint was written yet" if saved is None else f"checkpoint {saved} is good"
            )
            raise Diverged(f"{error}; {last}", error.step) from None

    def _validated(self, start: int, data_state: dict[str, Any] | None) -> Validations:
        """Returns the validations up to step ``start``, and pins the checkpoint of the best one."""
        notes = split(data_state or {})[1]
        found = Validations(**notes.get(VALIDATIONS, {}))
        # The validation that ended a run came after its last checkpoint; the run may be extended.
        ending = [r for r in read_metrics(self.workdir) if r["step"] == start] if start else []
        found = found.after_all(ending)
        self._pin(found)
        return found

    def _validate(self, step: int, state: TrainState, log: _Log) -> None:
        means = self.session.evaluate(with_average(state))
        log.evaluation(step, means)
        self.validations = self.validations.after(step, means["loss"])
        self._pin(self.validations)

    def _pin(self, validations: Validations) -> None:
        if self.session.experiment.training.keep_best:
            self.checkpoints.pin(validations.best)

    def _ends_early(self) -> bool:
        return self.validations.exhausted(self.session.experiment.training.patience)

    def _saves(self, step: int) -> bool:
        """Returns whether the state after ``step`` is saved without a signal."""
        training = self.session.experiment.training
        best = training.keep_best and step == self.validations.best
        due = self._due(step, training.checkpoint_every) or step == training.steps
        return due or best or self._ends_early()

    @staticmethod
    def _due(step: int, every: int) -> bool:
        return every > 0 and step % every == 0

    def _save(self, step: int, state: TrainState, batches: Any, logged: Logged) -> None:
        self._require_finite(step, state, "it is not saved")
        # Only the first process writes the log, so only its notes hold the logged steps.
        notes: dict[str, Any] = {TOKENIZER: self._tokenizer}
        if processes.is_first():
            notes[LOG] = logged.ranges
        if self.validations.last:
            notes[VALIDATIONS] = dataclasses.asdict(self.validations)
        self.checkpoints.save(step, named_leaves(state), {**batches.get_state(), **notes})
        self._saved = step

    @property
    def _tokenizer(self) -> str:
        return digest(self.session.tokenizer)

    def _require_good_start(self, start: int, state: TrainState) -> None:
        remedy = "start from weights that are finite"
        if self._saved is not None:
            folder = self.checkpoints.directory / str(start)
            remedy = f"remove {folder} to go on from an earlier checkpoint"
        self._require_finite(start, state, remedy)

    def _require_finite(self, step: int, state: TrainState, consequence: str) -> None:
        leaves = processes.fetch(_finite_leaves(state))
        bad = [name for name, finite in leaves.items() if not finite]
        if bad:
            others = f" and {len(bad) - 1} other arrays" if len(bad) > 1 else ""
            raise TrainingError(
                f"the state at step {step} holds numbers that are not finite, in {bad[0]}{others}: "
                f"{consequence}"
            )

    def _warn_of_lost_routing(self, start: int) -> None:
        if not (start and self.session.experiment.training.record_routing and processes.is_first()):
            return
        missing = self.record.missing(start)
        if missing:
            logging.warning(
                "%s has lost %s: the run goes on, and a replay of it will stop there",
                self.record.folder,
                spans(missing),
            )


class _Log:
    """Writes log lines and the progress bar; a line's rate covers the steps since the last line.

    Attributes:
        alarm: New condition that stops the run, in words; "" if there is none.
    """

    def __init__(self, session: Session, writer: MetricsWriter, bar: ProgressBar, watch: Watch):
        self._session, self._writer, self._bar, self._watch = session, writer, bar, watch
        self.alarm = ""
        self._alarms = dict[str, int]()  # active in the last line of each kind
        self._time, self._tokens = time.perf_counter(), 0
        experiment = session.experiment
        cost = count(experiment.model, session.tokenizer.vocab_size, experiment.sequence)
        self._flops_per_token = float(cost.training_flops_per_token)
        self._peak = peak_of(jax.devices())
        layers = experiment.model.sparse_layers()
        self._balance_weights = [layer.moe.router.balance_weights for layer in layers]

    def step(self, step: int, report: StepReport) -> None:
        experiment = self._session.experiment
        self._tokens += experiment.tokens_per_step
        if step % experiment.training.log_every and step != experiment.training.steps:
            return
        report = processes.fetch(report)
        record = train_record(
            step,
            report,
            experiment.moe_layers,
            learning_rate=self._learning_rate(step, report),
            tokens_per_second=self._rate(),
            flops_per_token=self._flops_per_token,
            peak_flops=self._peak,
            balance_weights=self._balance_weights,
        )
        self._write(record)
        self._bar.update(
            step,
            loss=record["loss"],
            tokens_per_second=record["tokens_per_second"],
            dropped=record["dropped_fraction"],
            model_flops_per_second=record["model_flops_per_second"],
            mfu=record.get("mfu"),
            alarms=sum(self._alarms.values()),
        )

    def _learning_rate(self, step: int, report: StepReport) -> float:
        experiment = self._session.experiment
        # The schedule counts updates, and a skipped batch is no update.
        updates = np.float32(step - 1 - int(report.skipped) + (not report.updated))
        return float(_compiled_rate(experiment.optimizer, updates, experiment.training.steps))

    def _rate(self) -> float:
        now = time.perf_counter()
        rate = self._tokens / (now - self._time)
        self._time, self._tokens = now, 0
        return rate

    def evaluation(self, step: int, means: dict[str, Any]) -> None:
        self._write(eval_record(step, means))

    def _write(self, record: dict[str, Any]) -> None:
        seen = self._watch.see(record)
        self._writer.write(seen.line)
        self._alarms[record["kind"]] = seen.line.get("active_alarms", 0)
        if processes.is_first():
            for text in seen.new:
                logging.warning("step %d: %s", record["step"], text)
        if seen.stops:
            self.alarm = "; ".join(seen.new)


class _Guard:
    """Stops a run after too many skipped updates in a row.

    It reads each report one step late, so that the host does not wait for the device.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._last: tuple[int, StepReport] | None = None

    def look(self, step: int, report: StepReport | None) -> None:
        self.close()
        self._last = None if report is None else (step, report)

    def close(self) -> None:
        if self._last is None:
            return
        step, report = self._last
        in_row = int(processes.fetch(report.skipped_in_row))
        if in_row and processes.is_first():
            fault, _ = _fault(report)
            logging.warning("step %d: %s; update skipped (%d in a row)", step, fault, in_row)
        if in_row >= self._limit:
            _, remedy = _fault(report)
            raise Diverged(
                f"{in_row} non-finite updates in a row at step {step}: {remedy}; parameters are "
                f"those before the first of them, step {step - in_row}",
                step - in_row,
            )


@dataclasses.dataclass(frozen=True)
class _Stopping:
    """Signals that stop the loop after a step.

    Attributes:
        begin: Function that delays signals to the end of a step, from the first step on.
        came: Function from the step to the number of the signal after which all processes stop at
            this step, or 0.
    """

    begin: Callable[[], None]
    came: Callable[[int], int]


def _stopped(step: int, alarm: str) -> str:
    return (
        f"an alarm stopped the run at step {step}, which is saved ({alarm}): the same command goes "
        "on from there; change training.alarms to be warned only"
    )


def _fault(report: StepReport) -> tuple[str, str]:
    """Returns the non-finite number of a skipped update, and the settings to check."""
    loss, norm = float(report.losses.loss), float(report.grad_norm)
    if np.isfinite(loss) and np.isfinite(norm):
        return (
            f"loss {loss} and gradient norm {norm} are finite, but the state after the update is "
            "not",
            "check optimizer.learning_rate, optimizer.clip_norm and the rates of the routers",
        )
    return (
        f"loss {loss} or gradient norm {norm} is not finite",
        "lower optimizer.learning_rate or look at the data",
    )


@contextmanager
def _stopping() -> Iterator[_Stopping]:
    if not jax.distributed.is_initialized():
        with signals.listening(lambda *_: None), signals.holding() as hold:
            yield _Stopping(hold.begin, lambda step: hold.came)
        return
    # JAX forwards the SIGTERM of one process to all, and the processes agree on a step.
    with signals.passing_on(signal.SIGTERM) as local:

        def came(step: int) -> int:
            if not multihost_utils.reached_preemption_sync_point(step):
                return 0
            received = multihost_utils.process_allgather(np.int32(local())).max()
            return int(received) or signal.SIGTERM

        yield _Stopping(lambda: None, came)
