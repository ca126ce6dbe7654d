"""Traces of some training steps, which XProf and Perfetto open."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from moe_jax.errors import ConfigError

PROFILE = "profile"
# Names of the parts of a step in a trace, as the modules give them by ``jax.named_scope``.
SCOPES = (
    *("router", "dispatch", "exchange", "experts", "combine"),
    *("attention", "head", "optimizer"),
)
_FORM = re.compile(r"(\d+):(\d+)")


@dataclasses.dataclass(frozen=True)
class Window:
    """The steps that a trace covers.

    Attributes:
        first: First traced step, from 1.
        end: First step after the trace.
    """

    first: int
    end: int

    def __contains__(self, step: object) -> bool:
        return isinstance(step, int) and self.first <= step < self.end

    def __str__(self) -> str:
        return f"{self.first}:{self.end}"


def window_of(text: str, steps: int) -> Window:
    """Returns the window ``FIRST:END``, which contains ``FIRST`` and does not contain ``END``.

    Args:
        text: The window, such as ``5:8`` for the steps 5, 6 and 7.
        steps: Number of steps of the run.

    Raises:
        ConfigError: If the text is no window, the window is empty, or the run has no such step.
    """
    found = _FORM.fullmatch(text)
    if not found:
        raise ConfigError(f"--profile={text} is not FIRST:END, such as --profile=5:8")
    window = Window(int(found[1]), int(found[2]))
    if window.first < 1:
        raise ConfigError(f"--profile={text} starts before step 1, the first step of a run")
    if window.end <= window.first:
        raise ConfigError(f"--profile={text} holds no step: END must be larger than FIRST")
    if window.end > steps + 1:
        raise ConfigError(
            f"--profile={text} ends after training.steps={steps}: END can be {steps + 1} at most"
        )
    return window


@dataclasses.dataclass
class Profiler:
    """Traces the steps of a window, on the first process of a run.

    Attributes:
        folder: Folder of the trace.
        window: Steps to trace; ``None`` traces no step.
    """

    folder: Path
    window: Window | None = None
    _active: bool = dataclasses.field(default=False, init=False)

    @contextlib.contextmanager
    def open(self) -> Iterator[Profiler]:
        """Ends a trace that is still active when the run stops."""
        try:
            yield self
        finally:
            self._stop()

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[list[Any]]:
        """Runs a training step inside the trace if the window contains the step.

        Args:
            step: Number of the step, from 1.

        Yields:
            A list. The trace waits for the arrays that the caller appends to the list.
        """
        results: list[Any] = []
        if self.window is None or step not in self.window or jax.process_index():
            yield results
            return
        if not self._active:
            self.folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
            self._active = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield results
            # The device runs behind the host, and the trace shall hold the whole step.
            jax.block_until_ready(results)
        if step + 1 not in self.window:
            self._stop()

    def _stop(self) -> None:
        if self._active:
            self._active = False
            jax.profiler.stop_trace()
