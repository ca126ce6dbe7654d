"""Rules on the log of a run, each a pure function of its newest lines.

A line is a record of ``metrics.jsonl``: the batch of a training step (``kind="train"``) or a
validation (``kind="eval"``), with the load of every MoE layer.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np

from moe_jax.ranges import NonNegative, Positive, Ranged, Ratio, Share

# A record of ``metrics.jsonl``.
Line: TypeAlias = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Alarm(Ranged, abc.ABC):
    """A rule on every MoE layer.

    Attributes:
        stop: True stops the run when the alarm is raised, after its state is saved. The same
            command continues the run, which a lasting condition does not stop again.
    """

    reads_top_scores: ClassVar[bool] = False
    reads_streams: ClassVar[bool] = True
    stop: bool = dataclasses.field(default=False, kw_only=True)

    @property
    def kind(self) -> str:
        """Kind of the lines that the rule reads: ``train`` or ``eval``."""
        return "train"

    @property
    def window(self) -> int:
        """Number of steps before the newest line whose lines the rule reads."""
        return 0

    @abc.abstractmethod
    def found(self, lines: Sequence[Line], reference: Line | None) -> dict[str, str]:
        """Returns the layers that meet the condition, with the reason in words.

        Args:
            lines: Lines of the rule's kind in order of their steps; the last one is the newest.
            reference: Line that a rule of drift compares with, or ``None`` if there is none yet.
        """

    def on_stream(self, line: Line, reference: Line | None) -> dict[str, str]:
        """Returns the layers that meet the condition on an evaluated stream, with the reason.

        Args:
            line: Evaluation of the stream, whatever the rule's kind is.
            reference: Line that a rule of drift compares with.
        """
        return self.found([line], reference)


@dataclasses.dataclass(frozen=True)
class LastingAlarm(Alarm):
    """A rule on a condition that every line of some steps meets.

    Attributes:
        steps: Number of steps; an evaluated stream counts as all of them.
    """

    steps: Positive = 100

    @property
    def window(self) -> int:
        """Number of steps before the newest line whose lines the rule reads."""
        return self.steps

    def found(self, lines: Sequence[Line], reference: Line | None) -> dict[str, str]:
        """Returns the layers that meet the condition in every line of the steps."""
        del reference
        start = lines[-1]["step"] - self.steps
        if lines[0]["step"] > start:
            return {}
        recent = [line for line in lines if line["step"] >= start]
        return self.during(recent, f"{self.steps} steps")

    def on_stream(self, line: Line, reference: Line | None) -> dict[str, str]:
        """Returns the layers that meet the condition on an evaluated stream, with the reason."""
        del reference
        return self.during([line], "the stream")

    @abc.abstractmethod
    def during(self, lines: Sequence[Line], span: str) -> dict[str, str]:
        """Returns the layers that meet the condition in every line, with the reason in words.

        Args:
            lines: Lines of the span.
            span: Name of the span in the words.
        """


@dataclasses.dataclass(frozen=True)
class DeadExperts(LastingAlarm):
    """Experts that no token of the logged batches reached in ``steps`` steps."""

    def during(self, lines: Sequence[Line], span: str) -> dict[str, str]:
        """Returns the layers with dead experts."""
        dead = {}
        for index, layer in enumerate(lines[-1]["layers"]):
            loads = np.array([line["layers"][index]["load"] for line in lines])
            experts = np.flatnonzero(loads.max(axis=0) == 0)
            if experts.size:
                names = ", ".join(map(str, experts[:4])) + (", ..." if experts.size > 4 else "")
                dead[str(layer["layer"])] = (
                    f"{experts.size} of {loads.shape[1]} experts ({names}) had no token in {span}"
                )
        return dead


@dataclasses.dataclass(frozen=True)
class SaturatedGates(LastingAlarm):
    """Gates that are saturated in ``steps`` steps: a token's top score is nearly all of its scores.

    A saturated softmax has almost no gradient, so that its router no longer learns. The rule reads
    the mean over the tokens of the top score as a share of the sum of the token's scores, from
    ``1 / E`` to 1. The routers of a run with this alarm sum these shares.

    Attributes:
        above: Largest allowed mean share.
    """

    reads_top_scores: ClassVar[bool] = True
    above: Share = 0.95

    def during(self, lines: Sequence[Line], span: str) -> dict[str, str]:
        """Returns the layers with saturated gates; a line without the shares has none."""
        saturated = {}
        for index, layer in enumerate(lines[-1]["layers"]):
            shares = [line["layers"][index].get("top_score", 0.0) for line in lines]
            least = float(np.min(_numbers(shares)))
            if least > self.above:
                saturated[str(layer["layer"])] = (
                    f"the mean share of the top score was at least {least:.3f} in {span}, "
                    f"above {self.above:g}"
                )
        return saturated


@dataclasses.dataclass(frozen=True)
class Overload(Alarm):
    """An expert that too many tokens choose, before capacity.

    Attributes:
        above: Largest allowed ratio of the largest to the mean load.
    """

    above: Ratio = 4.0

    def found(self, lines: Sequence[Line], reference: Line | None) -> dict[str, str]:
        """Returns the layers whose largest load is too high."""
        del reference
        what = "the largest load is {value:.2f} times the mean, above {limit:g}"
        return _layers(lines[-1], "max_mean_load", what, lambda x: x > self.above, self.above)


@dataclasses.dataclass(frozen=True)
class LowEntropy(Alarm):
    """A load that is concentrated on few experts, before capacity.

    Attributes:
        below: Smallest allowed entropy of the load, as a share of ``log E``.
    """

    below: Share = 0.7

    def found(self, lines: Sequence[Line], reference: Line | None) -> dict[str, str]:
        """Returns the layers whose entropy is too low."""
        del reference
        what = "the entropy of the load is {value:.3f} of log E, below {limit:g}"
        return _layers(lines[-1], "load_entropy", what, lambda x: x < self.below, self.below)


@dataclasses.dataclass(frozen=True)
class Drops(Alarm):
    """Choices that get no slot.

    Attributes:
        above: Largest allowed share of dropped choices.
    """

    above: Share = 0.2

    def found(self, lines: Sequence[Line], reference: Line | None) -> dict[str, str]:
        """Returns the layers that drop too many choices."""
        del reference
        what = "{value:.1%} of the choices are dropped, above {limit:.1%}"
        return _layers(lines[-1], "dropped_fraction", what, lambda x: x > self.above, self.above)


@dataclasses.dataclass(frozen=True)
class SilentBalance(Alarm):
    """An uneven load that no loss of the router sees: no loss with a weight balances the layer.

    A loss on logits alone, such as ``ZLoss``, does not count. Routers that a bias balances have no
    loss either, so the rule fits routers with a loss.

    Attributes:
        above: Ratio of the largest to the mean load from which on the load counts as uneven.
    """

    reads_streams: ClassVar[bool] = False
    above: Ratio = 2.0

    def found(self, lines: Sequence[Line], reference: Line | None) -> dict[str, str]:
        """Returns the layers with an uneven load and no loss."""
        del reference
        uneven = "no loss balances the router, and the largest load is {value:.2f} times the mean"
        layers = [layer for layer in lines[-1]["layers"] if layer.get("balance_loss") == 0]
        line = {**lines[-1], "layers": layers}
        return _layers(line, "max_mean_load", uneven, lambda x: x > self.above, self.above)

    def on_stream(self, line: Line, reference: Line | None) -> dict[str, str]:
        """Returns no layer, because an evaluation computes no loss of the router."""
        del line, reference
        return {}


@dataclasses.dataclass(frozen=True)
class Drift(Alarm):
    """A load before capacity that moves away from a reference on the validation set.

    The rule measures the Jensen-Shannon distance in base 2: 0 for equal loads, 1 for loads on
    disjoint experts.

    Attributes:
        above: Largest allowed distance.
        reference: Workdir of the run whose last validation is the reference; "" takes the first
            validation of this run.
    """

    above: Share = 0.2
    reference: str = ""

    @property
    def kind(self) -> str:
        """Kind of the lines that the rule reads: ``eval``."""
        return "eval"

    def found(self, lines: Sequence[Line], reference: Line | None) -> dict[str, str]:
        """Returns the layers whose load is too far from the reference."""
        if reference is None:
            return {}
        about = reference.get("about") or f"step {reference['step']}"
        before = {str(layer["layer"]): layer for layer in reference["layers"]}
        moved = {}
        for layer in lines[-1]["layers"]:
            both = layer, before[str(layer["layer"])]
            # Lines of older runs have the load after capacity alone.
            field = "demand" if all("demand" in one for one in both) else "load"
            distance = load_distance(*(one[field] for one in both))
            if distance > self.above:
                moved[str(layer["layer"])] = (
                    f"the load is at a distance of {distance:.3f} from the reference ({about}), "
                    f"above {self.above:g}"
                )
        return moved


@dataclasses.dataclass(frozen=True)
class Plateau(Alarm):
    """A loss that hardly falls: saturation of the whole model, under the name ``all``.

    The rule compares the mean loss of the last ``steps`` steps with the mean loss of as many steps
    before them; each mean is over the lines of the log in its steps.

    Attributes:
        steps: Number of steps of each mean.
        least: Smallest expected fall of the mean, in nats per target.
        log: Kind of the loss: ``train`` for the loss of training batches, ``eval`` for the loss
            of the validations of ``training.eval_every``.
    """

    reads_streams: ClassVar[bool] = False
    steps: Positive = 100
    least: NonNegative = 0.01
    log: Literal["train", "eval"] = "train"

    @property
    def kind(self) -> str:
        """Kind of the lines that the rule reads, which is ``log``."""
        return self.log

    @property
    def window(self) -> int:
        """Number of steps before the newest line whose lines the rule reads."""
        return 2 * self.steps

    def found(self, lines: Sequence[Line], reference: Line | None) -> dict[str, str]:
        """Returns ``all`` with the reason if the loss hardly falls."""
        del reference
        middle = lines[-1]["step"] - self.steps
        if lines[0]["step"] > middle - self.steps:
            return {}
        before = _numbers([x["loss"] for x in lines if middle - self.steps < x["step"] <= middle])
        after = _numbers([x["loss"] for x in lines if x["step"] > middle])
        if not before.size:
            return {}
        fall = float(np.mean(before) - np.mean(after))
        if not fall < self.least:
            return {}
        return {"all": f"the loss fell by {fall:.4f} in {self.steps} steps, below {self.least:g}"}

    def on_stream(self, line: Line, reference: Line | None) -> dict[str, str]:
        """Returns nothing, because one evaluation has no earlier loss."""
        del line, reference
        return {}


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    """Returns numbers of the log as an array; a value that was not finite is NaN."""
    return np.array(values, np.float64)


def load_distance(first: Sequence[float], second: Sequence[float]) -> float:
    """Returns the Jensen-Shannon distance in base 2 of two loads ``(E,)``, from 0 to 1.

    A load without any token is at distance 0 from a load without any, and 1 from every other.
    """
    loads = np.array([first, second], np.float64)
    totals = loads.sum(axis=1, keepdims=True)
    if not totals.all():
        return float(totals.any())
    shares = loads / totals
    # Half of the least number would be 0, so the sum stands for twice the mean.
    both = shares.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(shares > 0, shares * (np.log2(shares / both) + 1), 0.0)
    return float(np.sqrt(max(terms.sum() / 2, 0.0)))


def _layers(
    line: Line, number: str, what: str, wrong: Callable[[float], bool], limit: float
) -> dict[str, str]:
    """Returns the layers with a wrong number, in words; a layer without a token is left out."""
    return {
        str(layer["layer"]): what.format(value=layer[number], limit=limit)
        for layer in line["layers"]
        if layer["max_mean_load"] and wrong(layer[number])
    }
