"""Measures candidates in interleaved rounds, after their values are compared to the oracle."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.benchmark.candidate import Call, Candidate, CannotRun
from moe_jax.benchmark.given import Problem
from moe_jax.benchmark.oracle import Values, error, oracle

CEILING = "matmul"
FORWARD_BACKWARD = "forward_backward"
DIRECTIONS = ("forward", FORWARD_BACKWARD)
# Largest relative errors by norm that are accepted before a time is believed.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
_SIDE = {"cpu": 2048}
_QUANTILES = (20, 50, 80)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One line of the result; a value is ``None`` if it was not measured.

    Attributes:
        shape: Name of the shape.
        regime: Routing regime; ``router`` if the layer's own router chooses.
        part: ``experts``, ``layer``, or ``step`` for a whole train step.
        name: Name of the candidate.
        transport: Transport of moe_jax, or "".
        backend: Backend of grouped products, or "".
        direction: One of ``DIRECTIONS``, or ``step``.
        dtype: Type of the computation.
        skipped: Reason why there is no time, or "".
        p20: Seconds of a call that a fifth of the calls stays below.
        p50: Median seconds of a call.
        p80: Seconds of a call that four fifths of the calls stay below.
        tflops: Useful TFLOP/s of the experts, or of the whole model in a step, at the median.
        ceiling_share: ``tflops`` over the rate of a matrix product in the same rounds.
        memory: Peak bytes above inputs, weights and results.
        repeats: True if two runs give equal bits; ``None`` of a train step, which changes its
            weights, and of a layer that drops tokens.
        error: Largest relative error against float32, by norm, of the output and the gradients;
            ``None`` of a layer that drops tokens.
    """

    shape: str
    regime: str
    part: str
    name: str
    transport: str
    backend: str
    direction: str
    dtype: str
    skipped: str = ""
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    tflops: float | None = None
    ceiling_share: float | None = None
    memory: int | None = None
    repeats: bool | None = None
    error: float | None = None


@dataclasses.dataclass(frozen=True)
class Trial:
    """A row without values, and the function that opens its call.

    Attributes:
        row: Measurement to complete.
        open: Function that returns the call. It raises ``CannotRun`` if the candidate cannot run.
    """

    row: Measurement
    open: Callable[[], Call]


def measure(
    problem: Problem,
    candidates: Sequence[Candidate],
    part: str,
    directions: Sequence[str],
    rounds: int,
) -> list[Measurement]:
    """Returns a row for each direction and each candidate of one part.

    Args:
        problem: Weights, tokens and routing.
        candidates: Candidates of the part ``part``.
        part: ``experts`` or ``layer``.
        directions: Of ``DIRECTIONS``; the second one is forward and backward pass together.
        rounds: Number of rounds after the warm-up.
    """
    wanted = oracle(problem, part)
    rows = []
    for direction in directions:
        backward = direction == FORWARD_BACKWARD
        entries = [
            Trial(_row(problem, one, direction), functools.partial(one.open, problem, backward))
            for one in candidates
        ]
        rows += completed(entries, wanted, problem.shape.flops(backward), rounds)
    return rows


def completed(
    entries: Sequence[Trial], wanted: Values, flops: float, rounds: int
) -> list[Measurement]:
    """Returns the rows of entries that do the same work, with values and times.

    All calls stay in memory, and each round runs each of them once, so that a change of the
    machine's speed reaches all of them. A call with a wrong value gets no time.

    Args:
        entries: Rows and the functions that open their calls.
        wanted: Right values by name.
        flops: Useful FLOPs of a call.
        rounds: Number of rounds after the warm-up.
    """
    rows, calls = {}, {}
    for entry in entries:
        row = entry.row
        try:
            call = entry.open()
            row = _checked(row, call, wanted)
        except CannotRun as reason:
            row = dataclasses.replace(row, skipped=str(reason))
        except Exception as fault:  # a candidate that fails must not end the others
            line = (str(fault) or type(fault).__name__).splitlines()[0]
            row = dataclasses.replace(row, skipped=f"failed: {line[:120]}")
        rows[row.name] = row
        if not row.skipped:
            calls[row.name] = call.run
    if not calls:
        return [*rows.values()]
    product, work = _matmul(next(iter(rows.values())).dtype)
    times = interleaved({CEILING: product, **calls}, rounds)
    ceiling = work / float(np.median(times[CEILING])) / 1e12
    return [
        _timed(row, times[name], flops / 1e12, ceiling) if name in times else row
        for name, row in rows.items()
    ]


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Returns the seconds of each call in each round; a first round is a warm-up and not returned.

    Args:
        calls: Functions that wait for their results, by name.
        rounds: Number of rounds.
        clock: Function that returns the current time in seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            began = clock()
            call()
            if number:
                times[name].append(clock() - began)
    return times


def _row(problem: Problem, candidate: Candidate, direction: str) -> Measurement:
    return Measurement(
        problem.shape.name,
        problem.regime if candidate.part == "experts" else "router",
        candidate.part,
        candidate.name,
        candidate.transport,
        candidate.backend,
        direction,
        problem.dtype,
    )


def _checked(row: Measurement, call: Call, wanted: Values) -> Measurement:
    """Returns the row with memory, equality of two runs and error."""
    first, second = (call.values(call.run()) for _ in range(2))
    row = dataclasses.replace(row, memory=call.memory)
    if not first:
        return row
    repeats = all(np.array_equal(value, second[name]) for name, value in first.items())
    found = error(first, wanted)
    wrong = "" if found <= TOLERANCE[row.dtype] else f"wrong: relative error {found:.2g}"
    return dataclasses.replace(
        row, skipped=wrong, repeats=None if call.advances else bool(repeats), error=found
    )


def _timed(row: Measurement, times: Sequence[float], useful: float, ceiling: float) -> Measurement:
    p20, p50, p80 = (float(value) for value in np.percentile(times, _QUANTILES))
    rate = useful / p50
    return dataclasses.replace(
        row, p20=p20, p50=p50, p80=p80, tflops=rate, ceiling_share=rate / ceiling
    )


def _matmul(dtype: str) -> tuple[Callable[[], Any], float]:
    """Returns a square matrix product of random numbers, and its FLOPs."""
    side = _SIDE.get(jax.default_backend(), 8192)
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (side, side), jnp.float32).astype(dtype) for key in keys)
    product = jax.jit(jnp.matmul)
    return lambda: jax.block_until_ready(product(a, b)), 2.0 * side**3
