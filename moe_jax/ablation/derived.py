"""Quantities derived from the records of several arms: thresholds, differences, energy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.ablation.ablation import Ablation
from moe_jax.ablation.intervals import Interval, paired_difference
from moe_jax.ablation.sizes import MeasuredSeries

Record = Mapping[str, Any]
Records = Sequence[Record]
Array = np.ndarray

# Metrics that compare an arm with the threshold arm of its seed.
DERIVED = ("steps_to", "seconds_to")
# Metrics that are compared by ratio, since their values depend on the machine.
RATIOS = ("tokens_per_second", *DERIVED)
# Metrics in nats per token.
IN_NATS = ("loss", "best_loss", "train_loss", "excess_loss")
# GLaM (arXiv 2112.06905) used 456 MWh for 600B tokens with 96.6B active parameters, at six FLOPs
# per parameter and token. Its 574 h for 280B tokens on 1,024 TPU v4 correspond to 28 % of their
# peak of 275 TFLOP/s; its 213 MWh for 280B tokens give the same energy per FLOP.
JOULES_PER_FLOP = 456e6 * 3600 / (600e9 * 6 * 96.6e9)
ENERGY = (
    f"Energy is {JOULES_PER_FLOP:.2e} J per FLOP, from GLaM's 456 MWh for 600B tokens: TPU v4 at "
    "28 % of their peak. It is an estimate, not a measurement."
)
_SMOOTHED = 20


def smoothed(curve: Sequence[Sequence[float]]) -> tuple[Array, Array]:
    """Returns steps and the mean loss over the preceding twentieth of the run, ``(T,)`` each."""
    steps, losses = np.array(curve, float).T
    width = max(len(losses) // _SMOOTHED, 1)
    mean = np.convolve(losses, np.ones(width) / width, mode="valid")
    return steps[width - 1 :], mean


def with_thresholds(ablation: Ablation, records: Records) -> list[dict[str, Any]]:
    """Returns the records, with the time to the threshold if a run reaches it.

    ``weights`` is the arm that has trained the weights of the run.
    The threshold is the last validation loss of the threshold arm with the same seed, if the runs
    validate during training, and else its final smoothed training loss. ``steps_to`` and
    ``seconds_to`` are the time after which the loss of a run stays at or below the threshold;
    seconds assume the median speed of the run, without compilation. ``compute_multiplier`` is the
    training FLOPs of the threshold arm over those of the run until then. A diverged run never
    reaches a threshold and sets none.
    """
    validated = all("eval_curve" in line for line in records if not diverged(line))
    loss_of = validation if validated else _training
    ends = {
        line["seed"]: line
        for line in records
        if line["arm"] == ablation.threshold_arm and not diverged(line)
    }
    return [
        {
            **line,
            "weights": ablation.weights(line["arm"]),
            **_threshold(line, ends.get(line["seed"]), loss_of),
        }
        for line in records
    ]


def validation(line: Record) -> tuple[Array, Array]:
    """Returns steps and validation losses of a run, ``(T,)`` each."""
    steps, losses = np.array(line["eval_curve"], float).T
    return steps, losses


def _training(line: Record) -> tuple[Array, Array]:
    return smoothed(line["curve"])


def _threshold(
    line: Record, end: Record | None, loss_of: Callable[[Record], tuple[Array, Array]]
) -> dict[str, float]:
    if end is None or diverged(line):
        return {}
    steps, losses = loss_of(line)
    above = np.flatnonzero(losses > loss_of(end)[1][-1])
    first = above[-1] + 1 if len(above) else 0
    if first == len(steps):
        return {}
    step = float(steps[first])
    share = step / line["steps"]
    return {
        "steps_to": step,
        "seconds_to": share * line["tokens"] / line["tokens_per_second"],
        "compute_multiplier": end["training_flops"] / (share * line["training_flops"]),
    }


def step_seconds(records: Records) -> dict[str, float]:
    """Returns for each arm the median over seeds of the seconds per step, without compilation.

    Runs that diverged have no speed, and an arm of such runs alone is left out.
    """
    seconds: dict[str, list[float]] = {}
    for line in records:
        if line.get("tokens_per_second"):
            tokens_per_step = line["tokens"] / line["steps"]
            seconds.setdefault(line["arm"], []).append(tokens_per_step / line["tokens_per_second"])
    return {arm: float(np.median(values)) for arm, values in seconds.items()}


def diverged(line: Record) -> bool:
    """Returns whether a run diverged: its loss or gradient stayed non-finite."""
    return "diverged" in line


def by_arm(ablation: Ablation, records: Records) -> dict[str, list[Record]]:
    """Returns the records of each arm with records, in the order of the ablation."""
    arms = {arm: [line for line in records if line["arm"] == arm] for arm in ablation.arms}
    return {arm: lines for arm, lines in arms.items() if lines}


def values_of(records: Records, metric: str) -> dict[int, float]:
    """Returns a metric by seed, from the records that have the metric."""
    return {line["seed"]: line[metric] for line in records if line.get(metric) is not None}


def paired(high: Records, low: Records, metric: str) -> Interval | None:
    """Returns ``high - low`` over the common seeds; ``None`` for fewer than two seeds."""
    highs, lows = values_of(high, metric), values_of(low, metric)
    seeds = sorted(highs.keys() & lows.keys())
    if len(seeds) < 2:
        return None
    return paired_difference([highs[seed] for seed in seeds], [lows[seed] for seed in seeds])


def by_size(ablation: Ablation, series: MeasuredSeries, records: Records) -> dict[float, Interval]:
    """Returns the metric of each arm of a series minus its reference's, by size.

    Arms that have fewer than two seeds in common with the reference are left out.
    """
    arms = by_arm(ablation, records)
    reference = arms.get(series.reference, [])
    effects = {
        size: paired(arms.get(arm, []), reference, ablation.metric)
        for size, arm in sorted(series.arms.items())
    }
    return {size: effect for size, effect in effects.items() if effect is not None}


def ratio(ours: Records, theirs: Records, metric: str) -> float | None:
    """Returns the geometric mean of ``ours / theirs`` over common seeds; ``None`` without any."""
    top, bottom = values_of(ours, metric), values_of(theirs, metric)
    seeds = [seed for seed in top.keys() & bottom.keys() if top[seed] > 0 and bottom[seed] > 0]
    if not seeds:
        return None
    return float(np.exp(np.mean([np.log(top[seed] / bottom[seed]) for seed in sorted(seeds)])))


def axis_of(line: Record, axis: str) -> Array:
    """Returns the tokens, training FLOPs or joules at each point of a curve, ``(T,)``."""
    steps = np.array([step for step, _ in line["curve"]], float)
    share = steps / line["steps"]
    flops = line["training_flops"] * share
    axes = {"tokens": line["tokens"] * share, "flops": flops, "energy": flops * JOULES_PER_FLOP}
    return axes[axis]
