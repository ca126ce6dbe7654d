"""An ablation as data: a base config, arms, seeds, published numbers and claims to test."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from ml_collections import ConfigDict

from moe_jax.ablation.overlay import Overlay
from moe_jax.ablation.sizes import QualityBySize
from moe_jax.config.experiment import Experiment
from moe_jax.config.schema import build, override
from moe_jax.errors import ConfigError, nearest

Settings = Mapping[str, Any]
Axis = Literal["tokens", "flops", "energy"]
SCALES = ("cpu", "gpu", "pod")


@dataclasses.dataclass(frozen=True)
class Finished:
    """A setting whose value is the run folder of another arm; that arm is trained first.

    Attributes:
        arm: Name of the other arm; its run has the same scale and seed.
        trained_on: False if an arm that starts from the run only evaluates it.
    """

    arm: str
    trained_on: bool = dataclasses.field(default=True, kw_only=True)

    def __str__(self) -> str:
        """Returns a placeholder for the folder, for a config without runs."""
        return f"<finished run of arm {self.arm}>"


@dataclasses.dataclass(frozen=True)
class Changed(Finished):
    """A setting whose value is a folder that a command writes from the run of another arm.

    Attributes:
        command: Command of ``moe-jax`` that changes a trained model, such as ``prune``.
        flags: Flags of the command, without ``--input`` and ``--output``.
    """

    command: str
    flags: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Returns a placeholder for the folder, for a config without runs."""
        return f"<run of arm {self.arm} after {' '.join((self.command, *self.flags))}>"


@dataclasses.dataclass(frozen=True)
class Published:
    """Numbers of a paper.

    Attributes:
        source: Paper and table.
        scale: Scale of the published experiment, in words.
        metric: Quantity of the numbers, in words.
        values: Printed number of each arm; arms that the paper lacks are left out.
        measures: Metric of a record that measures the same quantity on other data; ``None`` if no
            metric does, as for accuracies.
        negated: Whether the paper prints the negative of the metric, such as a negative log
            perplexity for a loss.
    """

    source: str
    scale: str
    metric: str
    values: Mapping[str, float]
    measures: str | None = None
    negated: bool = False

    @property
    def measured(self) -> dict[str, float]:
        """Published values with the sign of the metric that runs measure."""
        return {arm: -value if self.negated else value for arm, value in self.values.items()}

    def effect(self, metric: str, low: str, high: str) -> float | None:
        """Returns ``high - low`` of a metric; ``None`` unless both numbers are printed."""
        values = self.measured
        if metric != self.measures or not {low, high} <= values.keys():
            return None
        return round(values[high] - values[low], 6)


@dataclasses.dataclass(frozen=True)
class Claim:
    """A statement of a paper about two arms, which the runs test.

    Attributes:
        text: Statement in words, with its source.
        metric: Name in ``METRICS`` of ``moe_jax.ablation.records`` or in ``DERIVED`` of
            ``moe_jax.ablation.derived``.
        low: Arm with the lower metric according to the claim.
        high: Arm with the higher metric.
        margin: Smallest difference that the claim needs; with ``within``, the largest difference
            that it allows.
        within: Whether the claim is that the two arms are about equal.
        published: Published effect ``high - low`` in this metric, if ``published`` of the ablation
            lacks one of the arms.
        paper: Source of ``published``, or the words of the paper if it prints no number.
    """

    text: str
    metric: str
    low: str
    high: str
    margin: float = 0.0
    within: bool = False
    published: float | None = None
    paper: str = ""

    @property
    def ours(self) -> bool:
        """Whether no paper makes the claim; its text then ends with ``(ours)``."""
        return self.text.endswith("(ours)")


@dataclasses.dataclass(frozen=True)
class Gate:
    """A condition of the runs without which no claim can be tested.

    Attributes:
        text: Condition in words.
        arm: Arm whose runs must meet it.
        metric: Metric whose mean over seeds must lie in the range.
        least: Lower end of the range.
        most: Upper end of the range.
    """

    text: str
    arm: str
    metric: str
    least: float = -math.inf
    most: float = math.inf


@dataclasses.dataclass(frozen=True)
class Effect:
    """The published effect of a claim.

    Attributes:
        value: Difference ``high - low`` in the metric of the claim; ``None`` if no number is
            printed.
        source: Source of the number; empty if nothing is published.
    """

    value: float | None
    source: str

    def __str__(self) -> str:
        number = "" if self.value is None else f"{self.value:+.4g}"
        return ", ".join(part for part in (number, self.source) if part)


@dataclasses.dataclass(frozen=True)
class Ablation:
    """A reproduction of a published table.

    Attributes:
        name: Name of the ablation and of its folder of results.
        title: Title in one line.
        base: Function that returns the base configuration of all arms.
        arms: Settings of each arm by dotted name. A function as value computes the setting from
            the configuration at its scale; ``Finished`` is the run folder of another arm.
        scales: Settings of each scale in ``SCALES``: sizes and budgets, never a setting of an arm.
        seeds: Number of seeds; a seed fixes the data order and the weights that arms share.
        metric: Metric of the figures, a name in ``moe_jax.ablation.records.METRICS``.
        published: Published numbers.
        claims: Claims that the runs test.
        threshold_arm: Arm whose final training loss is the threshold that other arms are timed to;
            empty for no threshold.
        against: Axes, besides steps, for the curves of the training loss.
        overlay: Published series and laws that the figure of the metric shows.
        sizes: Arms by the size of their experts, beside published scores by size.
        notes: Remarks for the reader, such as checks that try to explain a contradiction.
        first_seed: Seed of the first run; seeds for tuning differ from the seeds of verdicts.
        registered: Commit that registered the claims, before any run counted. Verdicts then follow
            the rule of ``experiments/registration.md``; without it, the interval is Student's.
        gates: Conditions without which no claim and no pair of arms can be tested. A claim among
            them is a positive control, which must be reproduced.
    """

    name: str
    title: str
    base: Callable[[], ConfigDict]
    arms: Mapping[str, Settings]
    scales: Mapping[str, Settings]
    seeds: int = 3
    metric: str = "loss"
    published: tuple[Published, ...] = ()
    claims: tuple[Claim, ...] = ()
    threshold_arm: str = ""
    against: tuple[Axis, ...] = ()
    overlay: Overlay | None = None
    sizes: QualityBySize | None = None
    notes: tuple[str, ...] = ()
    first_seed: int = 0
    registered: str = ""
    gates: tuple[Gate | Claim, ...] = ()
    # Experiments of the first seed by arm and scale: thousands of runs differ in their seeds alone.
    _built: dict[tuple[str, str], Experiment] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        """Raises ConfigError if arms, claims or scales do not fit together."""
        controls = [gate for gate in self.gates if isinstance(gate, Claim)]
        named = [arm for claim in (*self.claims, *controls) for arm in (claim.low, claim.high)]
        named += [gate.arm for gate in self.gates if isinstance(gate, Gate)]
        named += [arm for paper in self.published for arm in paper.values]
        named += [self.threshold_arm] if self.threshold_arm else []
        named += self.overlay.places if self.overlay else []
        named += self.sizes.arms if self.sizes else []
        named += [other.arm for arm in self.arms for other in self.finished(arm).values()]
        for arm in named:
            self.check_arm(arm)
        for arm in self.arms:
            self._reject_cycles(arm)
        arms = [item for settings in self.arms.values() for item in settings.items()]
        fixed = {key for key, value in arms if not callable(value)}
        for scale, settings in self.scales.items():
            if scale not in SCALES:
                raise ConfigError(f"{self.name}: scale {scale!r}{nearest(scale, SCALES)}")
            both = fixed & settings.keys()
            if both:
                raise ConfigError(f"{self.name}: scale {scale} changes {min(both)}, as arms do")

    def check_arm(self, arm: str) -> None:
        """Rejects an unknown arm.

        Raises:
            ConfigError: The arm is unknown; the message names the nearest arm.
        """
        if arm not in self.arms:
            raise ConfigError(f"{self.name} has no arm {arm!r}{nearest(arm, self.arms)}")

    def effect(self, claim: Claim) -> Effect:
        """Returns the published effect of a claim: its own number, or else of the first paper."""
        if claim.published is not None or claim.paper:
            return Effect(claim.published, claim.paper)
        for paper in self.published:
            value = paper.effect(claim.metric, claim.low, claim.high)
            if value is not None:
                return Effect(value, paper.source)
        return Effect(None, "")

    def finished(self, arm: str) -> dict[str, Finished]:
        """Returns the runs of other arms that an arm needs, by the setting that names them."""
        settings = self.arms[arm].items()
        return {name: value for name, value in settings if isinstance(value, Finished)}

    def weights(self, arm: str) -> str:
        """Returns the arm that has trained the weights of an arm: itself, or one it evaluates."""
        source = self.finished(arm).get("training.start_from")
        return arm if source is None or source.trained_on else self.weights(source.arm)

    def _reject_cycles(self, arm: str) -> None:
        seen: set[str] = set()
        rest = list(self.finished(arm).values())
        while rest:
            other = rest.pop().arm
            if other == arm:
                raise ConfigError(f"{self.name}: arm {arm!r} needs its own finished run")
            if other not in seen:
                seen.add(other)
                rest += self.finished(other).values()

    def config(self, arm: str, scale: str = "cpu", seed: int = 0) -> ConfigDict:
        """Returns the configuration of one run, with placeholders for ``Finished`` settings.

        Raises:
            ConfigError: The arm or the scale is unknown.
        """
        self.check_arm(arm)
        if scale not in self.scales:
            raise ConfigError(f"{self.name} has no scale {scale!r}{nearest(scale, self.scales)}")
        config = self.base()
        config.name = "ablation"  # Equal runs of two ablations then have equal configs.
        for settings in (self.scales[scale], self.arms[arm]):
            made = {key: v(config) if callable(v) else v for key, v in settings.items()}
            values = {k: str(v) if isinstance(v, Finished) else v for k, v in made.items()}
            override(Experiment, config, values)
        config.training.seed = config.data.seed = seed
        return config

    def experiment(self, arm: str, scale: str = "cpu", seed: int = 0) -> Experiment:
        """Returns the experiment of one run, built from ``config`` and checked."""
        if (arm, scale) not in self._built:
            self._built[arm, scale] = build(Experiment, self.config(arm, scale))
        first = self._built[arm, scale]
        data = dataclasses.replace(first.data, seed=seed)
        training = dataclasses.replace(first.training, seed=seed)
        return dataclasses.replace(first, data=data, training=training)

    def get_config(self, argument: str = "") -> ConfigDict:
        """Returns the configuration for ``--config=FILE:ARM[,SCALE[,SEED]]`` of any command."""
        parts = (argument or next(iter(self.arms))).split(",")
        scale = parts[1] if len(parts) > 1 else "cpu"
        seed = int(parts[2]) if len(parts) > 2 else 0
        return self.config(parts[0], scale, seed)
