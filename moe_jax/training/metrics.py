"""Metrics of a run: lines of JSON, TensorBoard events of the same, and a progress bar."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from tqdm import tqdm

from moe_jax.files import Appended, replaced
from moe_jax.routing import Counts
from moe_jax.training.events import Events, held
from moe_jax.training.history import Logged, spans
from moe_jax.training.step import EvalSums, Losses, StepReport

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"


def flatten(record: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a nested record under names such as ``layers/0/losses/balance``.

    Texts, booleans and nulls are left out; NaN and infinities stay.
    """
    return dict(_leaves(_plain(record), ""))


def _leaves(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _leaves(item, f"{name}/{key}" if name else str(key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, float(value)


def _plain(value: Any) -> Any:
    """Returns the same nested value of dicts, lists and Python scalars.

    A float32 becomes the Python float of exactly its value, so that JSON's shortest digits give
    back the same bits. Arrays of any rank become lists.
    """
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return np.asarray(value).tolist()
    return value


def train_record(
    step: int,
    report: StepReport,
    moe_layers: Iterable[int],
    *,
    learning_rate: float,
    tokens_per_second: float,
) -> dict[str, Any]:
    """Returns the line of ``metrics.jsonl`` for the batch before update ``step``.

    Args:
        step: the update, from 1.
        report: of the step, as NumPy's arrays.
        moe_layers: the index of each layer that the report describes.
        learning_rate: of the update.
        tokens_per_second: since the line before.
    """
    layers = [
        {"layer": layer, "losses": _floats(found.losses), **_load(found.counts)}
        for layer, found in zip(moe_layers, report.layers, strict=True)
    ]
    return {
        "kind": "train",
        "step": step,
        **_losses(report.losses),
        "grad_norm": float(report.grad_norm),
        "skipped_updates": int(report.skipped),
        "dropped_fraction": _dropped(found.counts for found in report.layers),
        "layers": layers,
        "learning_rate": learning_rate,
        "tokens_per_second": tokens_per_second,
    }


def eval_record(step: int, means: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the line of ``metrics.jsonl`` for a validation after update ``step``."""
    return {"kind": "eval", "step": step, **means}


def eval_means(sums: EvalSums, moe_layers: Iterable[int]) -> dict[str, Any]:
    """Returns means from sums over the validation set."""
    layers = [
        {"layer": layer, **_load(counts)}
        for layer, counts in zip(moe_layers, sums.layers, strict=True)
    ]
    return {
        "loss": float(sums.nll / sums.tokens),
        "bits_per_byte": float(sums.nll / np.log(2) / sums.bytes),
        "accuracy": float(sums.correct / sums.tokens),
        "dropped_fraction": _dropped(sums.layers),
        "layers": layers,
    }


def _losses(losses: Losses) -> dict[str, Any]:
    """Returns the losses by name, without those that the objective does not have."""
    values = {field.name: getattr(losses, field.name) for field in dataclasses.fields(losses)}
    return {
        name: np.asarray(value).tolist()
        for name, value in values.items()
        if value is not None and value.size
    }


def _load(counts: Counts) -> dict[str, Any]:
    load = counts.load / max(counts.load.sum(), 1)
    return {
        "dropped_fraction": float(counts.dropped / max(counts.demand.sum(), 1)),
        "unrouted_fraction": float(counts.unrouted / max(counts.valid, 1)),
        "load": [float(part) for part in load],
        # Before capacity: what got a slot is even wherever it binds.
        **load_statistics(counts.demand),
    }


def _dropped(layers: Iterable[Counts]) -> float:
    layers = list(layers)
    demand = sum(counts.demand.sum() for counts in layers)
    return float(sum(counts.dropped for counts in layers) / max(demand, 1)) if layers else 0.0


def _floats(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


def load_statistics(load: np.ndarray) -> dict[str, float]:
    """Returns how even a load ``(E,)`` is, of assignments asked for or of those that got a slot.

    Returns:
        ``load_entropy``: divided by ``log E``, 1 when even; ``max_mean_load``: largest over mean;
        ``max_violation``: that minus 1 (MaxVio of Wang et al. 2024). Zeros if nothing was routed.
    """
    load = np.asarray(load, np.float64)
    total = float(load.sum())
    if total == 0:
        return {"load_entropy": 0.0, "max_mean_load": 0.0, "max_violation": 0.0}
    share = load / total
    entropy = -float(np.sum(share * np.log(np.where(share > 0, share, 1.0))))
    peak = float(share.max() * share.size)
    even = entropy / math.log(share.size) if share.size > 1 else 1.0
    return {"load_entropy": even, "max_mean_load": peak, "max_violation": peak - 1.0}


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Returns the records of a run in order, none if there is no file.

    Raises:
        ValueError: if a line other than an unfinished last one is damaged.
    """
    path = Path(workdir) / METRICS
    return [record for record, _ in _intact(path)] if path.exists() else []


def _intact(path: Path) -> list[tuple[dict[str, Any], str]]:
    """Returns records and their lines, less a last line that a kill cut short."""
    lines = path.read_text(errors="replace").split("\n")
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            if line:
                found.append((_record(line), line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(
                    f"{path} line {number} is damaged ({error}): delete that line"
                ) from error
    return found


def _record(line: str) -> dict[str, Any]:
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise ValueError("it names no step")
    if not isinstance(record.get("kind"), str):
        raise ValueError("it names no kind")
    return record


class MetricsWriter:
    """Appends records to ``metrics.jsonl`` and to TensorBoard; only the first process writes.

    Attributes:
        logged: the records that must be in the file.
        lost: says which of them were not there when it was opened, or "".
    """

    def __init__(self, workdir: Path, resume_step: int | None = None, logged: Logged | None = None):
        """Opens the files.

        Args:
            workdir: the run's folder; made if missing.
            resume_step: records of later steps, written by a run that died after its last
                checkpoint, are removed: those steps are about to be repeated. 0 removes all of
                them, None none.
            logged: the records up to ``resume_step`` that must be there; None for those that are.

        Raises:
            ValueError: if a line other than an unfinished last one is damaged.
            WriteError: if the disk refuses.
        """
        self.logged, self.lost = logged or Logged(), ""
        self._active = jax.process_index() == 0
        if not self._active:
            return
        path, events = Path(workdir) / METRICS, Path(workdir) / TENSORBOARD
        kept = _truncate(path, math.inf if resume_step is None else resume_step)
        self._found = {(record["kind"], record["step"]) for record in kept}
        self._tell_lost(path)
        if logged is None:
            for kind, step in sorted(self._found, key=lambda record: record[1]):
                self.logged.add(kind, step)
        self._lines = Appended(path)
        shown = held(events) if resume_step else self._found
        self._events = Events(events, None if resume_step is None else resume_step + 1)
        self._show_again([r for r in kept if (r["kind"], r["step"]) not in shown], events)

    def _tell_lost(self, path: Path) -> None:
        missing = self.logged.missing(self._found)
        if not missing:
            return
        self.lost = f"{len(missing)} lines are missing: {spans(step for _, step in missing)}"
        logging.warning(
            "%s has lost what was logged (%s); the weights do not depend on it, so the run goes "
            "on, and its report and curves lack these lines",
            path,
            self.lost,
        )

    def _show_again(self, records: list[dict[str, Any]], folder: Path) -> None:
        if records:
            steps = spans(record["step"] for record in records)
            logging.warning("%s had lost %s: written again from %s", folder, steps, METRICS)
        for record in records:
            self._show(record)

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes one record with its ``kind`` and ``step``.

        The line is strict JSON: what is not finite becomes null. TensorBoard gets it as it is. A
        kind and step that the file held when it was opened is not written a second time, as
        happens when a finished run is started again.

        Args:
            record: nested dicts and lists of numbers, texts and arrays.

        Raises:
            WriteError: if the disk refuses; nothing of the line is left in the file then.
        """
        if not self._active or (record["kind"], int(record["step"])) in self._found:
            return
        record = _plain(record)
        line = json.dumps(_finite(record), allow_nan=False) + "\n"
        self._lines.write(line.encode())
        self.logged.add(record["kind"], record["step"])
        self._show(record)

    def _show(self, record: Mapping[str, Any]) -> None:
        numbers = {key: item for key, item in record.items() if key != "step"}
        self._events.add(record["kind"], record["step"], flatten(numbers))

    def close(self) -> None:
        """Closes the files."""
        if self._active:
            self._lines.close()
            self._events.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _truncate(path: Path, last_step: float) -> list[dict[str, Any]]:
    """Removes later records from the file, at once or not at all; returns those that it kept."""
    if not path.exists():
        return []
    kept = [(record, line) for record, line in _intact(path) if record["step"] <= last_step]
    with replaced(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for _, line in kept))
    return [record for record, _ in kept]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def printed(text: str) -> None:
    """Prints a line at once."""
    print(text, flush=True)


class ProgressBar:
    """Step, loss, tokens/s, dropped fraction and remaining time; plain lines off a terminal."""

    def __init__(
        self,
        start: int,
        steps: int,
        *,
        seconds_between_lines: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] = printed,
    ):
        """Shows ``start`` of ``steps``.

        Args:
            start: steps done before.
            steps: steps in all.
            seconds_between_lines: at least so long between plain lines.
            clock: current time in seconds.
            say: takes the plain lines.
        """
        self._say = say
        self._steps, self._pause, self._clock = steps, seconds_between_lines, clock
        self._first: tuple[int, float] | None = None
        self._shown = -math.inf
        self._active = jax.process_index() == 0
        terminal = self._active and sys.stderr.isatty()
        self._bar = tqdm(total=steps, initial=start, unit="step") if terminal else None

    def update(self, step: int, *, loss: float, tokens_per_second: float, dropped: float) -> None:
        """Shows the state after ``step``."""
        numbers = f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s, {dropped:.1%} dropped"
        if self._bar is not None:
            self._bar.set_postfix_str(numbers, refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._active:
            self._line(step, numbers)

    def _line(self, step: int, numbers: str) -> None:
        now = self._clock()
        # Counted from the first update, so that compilation is not taken for speed.
        first_step, began = self._first = self._first or (step, now)
        if now - self._shown < self._pause and step < self._steps:
            return
        self._shown = now
        left = "?"
        if step > first_step:
            seconds = (now - began) / (step - first_step) * (self._steps - step)
            left = tqdm.format_interval(seconds)
        self._say(f"step {step}/{self._steps}: {numbers}, {left} left")

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
