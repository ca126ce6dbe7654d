"""Gathers the tokens that an engine reads, with their experts, into windows of alarms."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from moe_jax.models import Decoder
from moe_jax.models.config import SparseLayer
from moe_jax.serving.running import StepDone
from moe_jax.serving.stream import ServedWindow, StreamJudge, StreamState, TrafficRules


class Traffic:
    """The alarms of an engine.

    A step adds its token ids and choices to a list. Once the list has a window of tokens, another
    thread judges it, and a new list begins. A window that fills while the one before is still
    judged is left out.

    """

    def __init__(self, rules: TrafficRules, layers: Sequence[SparseLayer]):
        """Starts without a token.

        Args:
            rules: Alarms.
            layers: The MoE layers of the model; see ``layers_of``.
        """
        self._rules, self._judge = rules, StreamJudge(rules, layers)
        self._steps: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._tokens = 0
        self._pool = ThreadPoolExecutor(1, "alarms")
        self._judged: Future[StreamState] | None = None

    def read(self, done: StepDone) -> None:
        """Adds the tokens of a step, drafts included, whose samples are in the host's memory."""
        valid, requests = done.inputs.valid, np.zeros(done.shape.tokens, np.int64)
        for part in done.parts:
            first = part.first(done.shape)
            last = first + part.end - part.request.held.computed
            requests[first:last] = part.request.number
        tokens, choices = np.asarray(done.inputs.tokens), np.asarray(done.samples.choices)
        self._steps.append((tokens[valid], requests[valid], choices[:, valid]))
        self._tokens += len(self._steps[-1][0])
        if self._tokens >= self._rules.window:
            self._begin()

    @property
    def state(self) -> StreamState:
        """Active alarms after the last judged window."""
        return self._judge.state

    def wait(self) -> None:
        """Waits for the judgement that has begun."""
        if self._judged is not None:
            self._judged.exception()

    def _begin(self) -> None:
        """Gives the window to the other thread, if that is free, and begins a new one."""
        steps, self._steps, self._tokens = self._steps, [], 0
        if self._judged is None or self._judged.done():
            self._judged = self._pool.submit(self._see, steps)
            self._judged.add_done_callback(self._report)

    def _see(self, steps: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> StreamState:
        tokens, requests, choices = zip(*steps, strict=True)
        window = ServedWindow(
            np.concatenate(tokens), np.concatenate(requests), np.concatenate(choices, axis=1)
        )
        return self._judge.see(window)

    def _report(self, judged: Future[StreamState]) -> None:
        """Says the error of a judgement, after which the engine goes on."""
        if error := judged.exception():
            self._rules.say(f"the alarms have failed: {error!r}")


def layers_of(model: Decoder) -> tuple[SparseLayer, ...]:
    """Returns the MoE layers of a model in the order of its reports."""
    return model.config.sparse_layers()[: model.layers.num_sparse]
