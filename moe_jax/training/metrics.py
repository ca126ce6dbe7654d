"""Metrics of a run: lines of JSON, other writers with the same numbers, a progress bar."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import jax
import numpy as np
from absl import logging
from tqdm import tqdm

from moe_jax.files import Appended, finite, replaced
from moe_jax.routing import Counts
from moe_jax.routing.changeable import weight_name
from moe_jax.routing.observing import TOP_SCORE
from moe_jax.training.events import Events, held
from moe_jax.training.history import Logged, spans
from moe_jax.training.noise import NOISE, GradientNoise
from moe_jax.training.step import EvalSums, Losses, StepReport
from moe_jax.training.wandb_run import WandbRun

METRICS, TENSORBOARD, WANDB = "metrics.jsonl", "tensorboard", "wandb"
REPORT = "report.html"
Record: TypeAlias = Mapping[str, Any]


class Writer(Protocol):
    """A receiver of the numbers of a run, besides ``metrics.jsonl``."""

    def add(self, kind: str, step: int, numbers: Mapping[str, float]) -> None:
        """Writes the numbers of one record under names such as ``train/loss``."""

    def close(self) -> None:
        """Ends the writer."""


def flatten(record: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a nested record under names such as ``layers/0/losses/balance``.

    The result lacks texts, booleans and nulls; it keeps NaN and infinities.
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
    """Returns the nested value as dicts, lists and Python scalars.

    A float32 becomes the Python float of equal value, so the digits in JSON restore the same bits.
    Arrays of any rank become lists.
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
    moe_layers: Iterable[str | int],
    *,
    learning_rate: float,
    tokens_per_second: float,
    flops_per_token: float = 0.0,
    peak_flops: float = 0.0,
    balance_weights: Sequence[Mapping[str, float]] = (),
) -> dict[str, Any]:
    """Returns the line of ``metrics.jsonl`` for the batch before update ``step``.

    Args:
        step: Number of the update, from 1.
        report: Report of the step, with NumPy arrays.
        moe_layers: Index of each layer that the report describes.
        learning_rate: Learning rate of the update.
        tokens_per_second: Number of tokens per second since the previous line.
        flops_per_token: FLOPs per token that training the model needs; 0 if they are unknown.
        peak_flops: Peak of all devices in FLOP/s; 0 if it is unknown.
        balance_weights: Factor of each loss that balances the load, by name, for each layer; empty
            leaves ``balance_loss`` out.
    """
    layers = [
        {"layer": layer, "losses": _floats(one.losses), **_load(one.counts)}
        for layer, one in zip(moe_layers, report.layers, strict=True)
    ]
    settings = report.settings or {}
    for layer, weights in zip(layers, balance_weights, strict=False):
        now = {name: settings.get(weight_name(name), weight) for name, weight in weights.items()}
        layer["balance_loss"] = sum(float(now[name]) * layer["losses"][name] for name in weights)
    return {
        "kind": "train",
        "step": step,
        **_losses(report.losses),
        "grad_norm": float(report.grad_norm),
        **_noise(report.noise),
        "skipped_updates": int(report.skipped),
        "dropped_fraction": _dropped(one.counts for one in report.layers),
        "layers": layers,
        "learning_rate": learning_rate,
        **({"settings": _floats(report.settings)} if report.settings else {}),
        "tokens_per_second": tokens_per_second,
        **utilisation(tokens_per_second * flops_per_token, peak_flops),
    }


def utilisation(flops_per_second: float, peak_flops: float) -> dict[str, float]:
    """Returns the rate of the model's FLOPs and its share of the peak, as far as they are known.

    Args:
        flops_per_second: FLOPs per second that the model needs: neither recomputed FLOPs nor those
            of empty slots count. 0 if they are unknown.
        peak_flops: Peak of all devices in FLOP/s; 0 if it is unknown.

    Returns:
        ``model_flops_per_second``, and ``mfu``, the model FLOPs utilisation (PaLM, 2204.02311,
        appendix B), if the peak is known.
    """
    if not flops_per_second:
        return {}
    known = {"model_flops_per_second": flops_per_second}
    return known | ({"mfu": flops_per_second / peak_flops} if peak_flops else {})


def eval_record(step: int, means: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the line of ``metrics.jsonl`` for a validation after update ``step``."""
    return {"kind": "eval", "step": step, **means}


def eval_means(sums: EvalSums, moe_layers: Iterable[str | int]) -> dict[str, Any]:
    """Returns the metrics of a validation, from the sums over the validation set."""
    layers = [
        {
            "layer": layer,
            **_load(counts),
            # A rule of drift compares demand, because full experts look balanced after capacity.
            "demand": shares(counts.demand),
        }
        for layer, counts in zip(moe_layers, sums.layers, strict=True)
    ]
    return {
        **target_means(sums),
        "dropped_fraction": _dropped(sums.layers),
        "layers": layers,
    }


def target_means(sums: EvalSums) -> dict[str, float]:
    """Returns loss in nats per target, bits per byte and accuracy."""
    return {
        "loss": float(sums.nll / sums.tokens),
        "bits_per_byte": float(sums.nll / np.log(2) / sums.bytes),
        "accuracy": float(sums.correct / sums.tokens),
    }


def _losses(losses: Losses) -> dict[str, Any]:
    """Returns by name the losses that the objective has."""
    values = {field.name: getattr(losses, field.name) for field in dataclasses.fields(losses)}
    return {
        name: np.asarray(value).tolist()
        for name, value in values.items()
        if value is not None and value.size
    }


def _noise(noise: GradientNoise | None) -> dict[str, dict[str, float]]:
    """Returns the estimates of the gradient's noise, if the step has made them."""
    return {} if noise is None else {NOISE: _floats(dataclasses.asdict(noise))}


def _load(counts: Any) -> dict[str, Any]:
    """Returns the fractions and the load of one layer's ``Counts`` of NumPy arrays."""
    return {
        "dropped_fraction": float(counts.dropped / max(counts.demand.sum(), 1)),
        "unrouted_fraction": float(counts.unrouted / max(counts.valid, 1)),
        "load": shares(counts.load),
        # The load before capacity: once capacity binds, accepted load looks balanced.
        **load_statistics(counts.demand),
        **_top_score(counts),
    }


def shares(counts: Any) -> list[float]:
    """Returns NumPy counts ``(E,)`` as shares of their sum."""
    return (counts / max(counts.sum(), 1)).tolist()


def _top_score(counts: Any) -> dict[str, float]:
    """Returns the mean share of the top score over the tokens, if the routers have summed it."""
    if TOP_SCORE not in counts.observed:
        return {}
    return {TOP_SCORE: float(counts.observed[TOP_SCORE] / max(counts.valid, 1))}


def _dropped(layers: Iterable[Counts]) -> float:
    layers = list(layers)
    demand = sum(counts.demand.sum() for counts in layers)
    return float(sum(counts.dropped for counts in layers) / max(demand, 1)) if layers else 0.0


def _floats(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


def load_statistics(load: np.ndarray) -> dict[str, float]:
    """Returns the balance of a load ``(E,)``, measured before or after capacity.

    Returns:
        ``load_entropy``, the entropy divided by ``log E``, 1 for a balanced load;
        ``max_mean_load``, the largest load over the mean load; and ``max_violation``, which is
        ``max_mean_load`` minus 1 (MaxVio, 2408.15664). All are 0 if no token was routed.
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
    """Returns the records of a run in order; an empty list without a file.

    Raises:
        ValueError: If a line is damaged that is not an unfinished last line.
    """
    path = Path(workdir) / METRICS
    return [record for record, _ in _intact(path)] if path.exists() else []


def _intact(path: Path) -> list[tuple[dict[str, Any], str]]:
    """Returns records and their lines, without a last line that a kill cut short."""
    lines = path.read_text(errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            if line:
                records.append((_record(line), line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(
                    f"{path} line {number} is damaged ({error}): delete that line"
                ) from error
    return records


def _record(line: str) -> dict[str, Any]:
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise ValueError("it names no step")
    if not isinstance(record.get("kind"), str):
        raise ValueError("it names no kind")
    return record


class MetricsWriter:
    """Appends records to ``metrics.jsonl`` and to other writers; only the first process writes.

    Attributes:
        logged: Records that must be in the file.
        lost: Records that the file lacked when it was opened, in words; "" if it lacked none.
    """

    def __init__(
        self,
        workdir: Path,
        resume_step: int | None = None,
        logged: Logged | None = None,
        writers: Collection[str] = (TENSORBOARD,),
    ):
        """Opens the files.

        Args:
            workdir: Folder of the run, created if missing.
            resume_step: Last step whose records are kept. Later records come from a run that died
                after its last checkpoint, and this run repeats their steps. 0 removes all
                records, ``None`` removes none.
            logged: Records up to ``resume_step`` that must be in the file; ``None`` for the records
                that are in the file.
            writers: Names of further writers, ``tensorboard`` and ``wandb``.

        Raises:
            ValueError: If a line is damaged that is not an unfinished last line.
            WriteError: If the file cannot be written.
            TrainingError: If ``wandb`` cannot start.
        """
        self.logged, self.lost = logged or Logged(), ""
        self._active = jax.process_index() == 0
        if not self._active:
            return
        path = Path(workdir) / METRICS
        records = _truncate(path, math.inf if resume_step is None else resume_step)
        self._found = {(record["kind"], record["step"]) for record in records}
        self._warn_of_lost(path)
        if logged is None:
            for kind, step in sorted(self._found, key=lambda record: record[1]):
                self.logged.add(kind, step)
        self._lines = Appended(path)
        self._writers = list[Writer]()
        if TENSORBOARD in writers:
            self._writers.append(self._events(Path(workdir) / TENSORBOARD, records, resume_step))
        if WANDB in writers:
            self._writers.append(WandbRun(Path(workdir)))

    def _events(self, folder: Path, records: Collection[Record], resume_step: int | None) -> Events:
        """Opens the event files, and writes the records again that they have lost."""
        shown = held(folder) if resume_step else self._found
        events = Events(folder, None if resume_step is None else resume_step + 1)
        lost = [record for record in records if (record["kind"], record["step"]) not in shown]
        if lost:
            steps = spans(record["step"] for record in lost)
            logging.warning("%s had lost %s: written again from %s", folder, steps, METRICS)
        for record in lost:
            events.add(record["kind"], record["step"], _numbers(record))
        return events

    def _warn_of_lost(self, path: Path) -> None:
        missing = self.logged.missing(self._found)
        if not missing:
            return
        self.lost = f"{len(missing)} lines are missing: {spans(step for _, step in missing)}"
        logging.warning(
            "%s has lost logged lines (%s); the weights do not depend on them, so the run "
            "continues, and its report and curves lack these lines",
            path,
            self.lost,
        )

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes one record with its ``kind`` and ``step``.

        The line is strict JSON: NaN and infinities become null. Other writers get the unchanged
        numbers. A record whose kind and step were in the file when it was opened is not written
        again; this happens when a finished run is started again.

        Args:
            record: Nested dicts and lists of numbers, texts and arrays.

        Raises:
            WriteError: If the file cannot be written; it then has no part of the line.
        """
        if not self._active or (record["kind"], int(record["step"])) in self._found:
            return
        record = _plain(record)
        line = json.dumps(finite(record), allow_nan=False) + "\n"
        self._lines.write(line.encode())
        self.logged.add(record["kind"], record["step"])
        for writer in self._writers:
            writer.add(record["kind"], record["step"], _numbers(record))

    def close(self) -> None:
        """Closes the files."""
        if self._active:
            self._lines.close()
            for writer in self._writers:
                writer.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _numbers(record: Record) -> dict[str, float]:
    return flatten({key: item for key, item in record.items() if key != "step"})


def _truncate(path: Path, last_step: float) -> list[dict[str, Any]]:
    """Removes later records from the file, atomically, and returns the remaining records."""
    if not path.exists():
        return []
    lines = [(record, line) for record, line in _intact(path) if record["step"] <= last_step]
    with replaced(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for _, line in lines))
    return [record for record, _ in lines]


def printed(text: str) -> None:
    """Prints a line at once."""
    print(text, flush=True)


class ProgressBar:
    """Shows step, loss, tokens/s, model FLOP/s, MFU, dropped fraction, alarms and remaining time.

    Outside a terminal the progress bar prints plain lines.
    """

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
            start: Number of steps that are already done.
            steps: Number of steps of the run.
            seconds_between_lines: Shortest time between plain lines, in seconds.
            clock: Function that returns the current time in seconds.
            say: Function that receives the plain lines.
        """
        self._say = say
        self._steps, self._pause, self._clock = steps, seconds_between_lines, clock
        self._first: tuple[int, float] | None = None
        self._shown = -math.inf
        self._active = jax.process_index() == 0
        terminal = self._active and sys.stderr.isatty()
        self._bar = tqdm(total=steps, initial=start, unit="step") if terminal else None

    def update(
        self,
        step: int,
        *,
        loss: float,
        tokens_per_second: float,
        dropped: float,
        model_flops_per_second: float = 0.0,
        mfu: float | None = None,
        alarms: int = 0,
    ) -> None:
        """Shows the metrics after ``step``, and the number of active alarms if there are any.

        A rate of 0 and an MFU of ``None`` are unknown.
        """
        rates = [f"{tokens_per_second:,.0f} tokens/s"]
        if model_flops_per_second:
            rates.append(f"{tqdm.format_sizeof(model_flops_per_second)}FLOP/s")
        if mfu is not None:
            rates.append(f"MFU {mfu:.1%}")
        numbers = f"loss {loss:.3f}, {', '.join(rates)}, {dropped:.1%} dropped"
        if alarms:
            numbers += f", {alarms} alarm{'s' if alarms > 1 else ''}"
        if self._bar is not None:
            self._bar.set_postfix_str(numbers, refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._active:
            self._line(step, numbers)

    def _line(self, step: int, numbers: str) -> None:
        now = self._clock()
        # Time counts from the first update, so that it does not include compilation.
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
        """Closes the progress bar and leaves it on the screen."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
