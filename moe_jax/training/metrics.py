"""Metrics of a run: lines of JSON, TensorBoard events of the same, and a progress bar."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"


def flatten(record: Any, prefix: str = "") -> dict[str, float]:
    """Returns the numbers of a nested record under names such as ``layers/0/losses/balance``."""
    if isinstance(record, Mapping):
        items = record.items()
    elif isinstance(record, list):
        items = enumerate(record)
    else:
        number = isinstance(record, int | float) and not isinstance(record, bool)
        return {prefix: float(record)} if number else {}
    found: dict[str, float] = {}
    for key, value in items:
        found |= flatten(value, f"{prefix}/{key}" if prefix else str(key))
    return found


def load_statistics(load: np.ndarray) -> dict[str, float]:
    """Returns how even a load ``(E,)`` is.

    Returns:
        ``load_entropy``: divided by ``log E``, 1 when even; ``max_mean_load``: largest over mean;
        ``max_violation``: that minus 1 (MaxVio of Wang et al. 2024). Zeros if nothing was routed.
    """
    total = float(np.sum(load))
    if total == 0:
        return {"load_entropy": 0.0, "max_mean_load": 0.0, "max_violation": 0.0}
    share = np.asarray(load, np.float64) / total
    entropy = -float(np.sum(share * np.log(np.where(share > 0, share, 1.0))))
    peak = float(share.max() * share.size)
    scale = math.log(share.size) if share.size > 1 else 1.0
    even = entropy / scale if share.size > 1 else 1.0
    return {"load_entropy": even, "max_mean_load": peak, "max_violation": peak - 1.0}


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Returns the records of a run in order; a line cut short by a kill is left out."""
    path = Path(workdir) / METRICS
    return [record for record, _ in _intact(path)] if path.exists() else []


def _intact(path: Path) -> list[tuple[dict[str, Any], str]]:
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append((json.loads(line), line))
        except json.JSONDecodeError:
            continue
    return found


class MetricsWriter:
    """Appends records to ``metrics.jsonl`` and to TensorBoard; only the first process writes."""

    def __init__(self, workdir: Path, *, resume_step: int = 0):
        """Opens the files.

        Args:
            workdir: the run's folder.
            resume_step: records of later steps, written by a run that died after its last
                checkpoint, are removed: those steps are about to be repeated.
        """
        self._active = jax.process_index() == 0
        if not self._active:
            return
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / METRICS
        if path.exists():
            kept = [line for record, line in _intact(path) if record["step"] <= resume_step]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(f"{line}\n" for line in kept))
            os.replace(temporary, path)
        self._lines = path.open("a")
        self._events = SummaryWriter(str(workdir / TENSORBOARD), purge_step=resume_step + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes one record with its ``kind`` and ``step``; what is not finite becomes null."""
        if not self._active:
            return
        self._lines.write(json.dumps(_strict(record), allow_nan=False) + "\n")
        self._lines.flush()
        step = record["step"]
        for name, value in flatten({k: v for k, v in record.items() if k != "step"}).items():
            self._events.add_scalar(f"{record['kind']}/{name}", value, step)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._active:
            self._lines.close()
            self._events.close()


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class ProgressBar:
    """Step, loss, tokens/s, dropped fraction and remaining time; plain lines off a terminal."""

    def __init__(self, start: int, steps: int, *, seconds_between_lines: float = 10.0):
        """Shows ``start`` of ``steps``."""
        self._steps, self._pause = steps, seconds_between_lines
        self._start, self._began, self._shown = start, time.monotonic(), -math.inf
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
            now = time.monotonic()
            if now - self._shown < self._pause and step < self._steps:
                return
            self._shown = now
            left = (now - self._began) / max(step - self._start, 1) * (self._steps - step)
            print(f"step {step}/{self._steps}: {numbers}, {left:.0f} s left", flush=True)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
