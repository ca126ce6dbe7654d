"""Measures candidates in interleaved rounds, after their values are compared to the oracle."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.benchmark.candidate import Call, Candidate, Skipped
from moe_jax.benchmark.given import Problem
from moe_jax.benchmark.oracle import Values, error, oracle

CEILING = "matmul"
# Largest relative errors by norm that are accepted before a time is believed.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
_SIDE = {"cpu": 1024}
_QUANTILES = (20, 50, 80)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the result; a value is ``None`` if it was not measured.

    Attributes:
        shape: Name of the shape.
        regime: Routing regime; ``router`` if the layer's own router chooses.
        part: ``experts`` or ``layer``.
        name: Name of the candidate.
        transport: Transport of moe_jax, or "".
        backend: Backend of grouped products, or "".
        direction: ``forward`` or ``forward_backward``.
        dtype: Type of the computation.
        skipped: Reason why there is no time, or "".
        p20: Seconds of a call that a fifth of the calls stays below.
        p50: Median seconds of a call.
        p80: Seconds of a call that four fifths of the calls stay below.
        tflops: Useful TFLOP/s of the experts at the median.
        ceiling_share: ``tflops`` over the rate of a matrix product in the same rounds.
        memory: Peak bytes above inputs, weights and results.
        repeats: True if two runs give equal bits.
        error: Largest relative error against float32, by norm, of the output and the gradients.
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


def measure(
    problem: Problem, candidates: Sequence[Candidate], part: str, backward: bool, rounds: int
) -> list[Row]:
    """Returns a row for each candidate of one part, in one direction.

    All candidates stay in memory, and each round calls each of them once, so that a change of the
    machine's speed reaches all of them. A candidate with a wrong value gets no time.

    Args:
        problem: Weights, tokens and routing.
        candidates: Candidates of the part ``part``.
        part: ``experts`` or ``layer``.
        backward: True measures forward and backward pass together.
        rounds: Number of rounds after the warm-up.
    """
    wanted = oracle(problem, part)
    rows, calls = {}, {}
    for candidate in candidates:
        row = _row(problem, candidate, backward)
        try:
            call = candidate.open(problem, backward)
            row = _checked(row, call, wanted)
        except Skipped as reason:
            row = dataclasses.replace(row, skipped=str(reason))
        except Exception as fault:  # a candidate that fails must not end the others
            line = (str(fault) or type(fault).__name__).splitlines()[0]
            row = dataclasses.replace(row, skipped=f"failed: {line[:120]}")
        rows[candidate.name] = row
        if not row.skipped:
            calls[candidate.name] = call.run
    product, flops = _matmul(problem.dtype)
    times = interleaved({CEILING: product, **calls}, rounds)
    ceiling = flops / float(np.median(times[CEILING])) / 1e12
    useful = problem.shape.flops(backward) / 1e12
    return [
        _timed(row, times[name], useful, ceiling) if name in times else row
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


def _row(problem: Problem, candidate: Candidate, backward: bool) -> Row:
    return Row(
        problem.shape.name,
        problem.regime if candidate.part == "experts" else "router",
        candidate.part,
        candidate.name,
        candidate.transport,
        candidate.backend,
        "forward_backward" if backward else "forward",
        problem.dtype,
    )


def _checked(row: Row, call: Call, wanted: Values) -> Row:
    """Returns the row with memory, equality of two runs and error."""
    first, second = (call.values(call.run()) for _ in range(2))
    repeats = all(np.array_equal(value, second[name]) for name, value in first.items())
    found = error(first, wanted)
    wrong = "" if found <= TOLERANCE[row.dtype] else f"wrong: relative error {found:.2g}"
    return dataclasses.replace(
        row, skipped=wrong, memory=call.memory, repeats=bool(repeats), error=found
    )


def _timed(row: Row, times: Sequence[float], useful: float, ceiling: float) -> Row:
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
