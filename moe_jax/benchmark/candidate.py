"""The interface of everything that the benchmark measures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from moe_jax.benchmark.given import Problem
from moe_jax.benchmark.oracle import Values


class CannotRun(Exception):
    """A candidate that cannot run here; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class Call:
    """One direction of a candidate, compiled or ready to run.

    Attributes:
        run: Function that computes once and waits for the result.
        values: Function from a result to arrays by name: ``y``, and after a backward pass the
            gradients ``x``, ``up``, ``down``, ``gate`` and, of a whole layer, ``router``. No array
            if the layer drops tokens, since the oracle drops none.
        memory: Peak bytes above inputs, weights and results; ``None`` if they are unknown.
        advances: True if each run changes what the next run computes, as a train step does.
    """

    run: Callable[[], Any]
    values: Callable[[Any], Values]
    memory: int | None = None
    advances: bool = False


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A layer that the benchmark can measure.

    Attributes:
        name: Name of the implementation.
        part: ``experts`` with a given routing, or the whole ``layer`` with its router.
        open: Function of a problem and of the direction (True with the backward pass) that returns
            the call. It raises ``CannotRun`` if the candidate cannot run here.
        transport: Transport of the tokens, for layers of moe_jax.
        backend: Backend of grouped products, for the transport ``ragged``.
    """

    name: str
    part: str
    open: Callable[[Problem, bool], Call]
    transport: str = ""
    backend: str = ""
