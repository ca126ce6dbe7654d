"""An ablation as data: a base config, arms, seeds, what a paper reports and the claims to test."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from ml_collections import ConfigDict

from moe_jax.ablation.overlay import Overlay
from moe_jax.config.experiment import Experiment
from moe_jax.config.schema import build, override
from moe_jax.errors import ConfigError, nearest

Settings = Mapping[str, Any]
Axis = Literal["tokens", "flops", "energy"]
SCALES = ("cpu", "gpu", "pod")


@dataclasses.dataclass(frozen=True)
class Finished:
    """As a setting of an arm: the folder of another arm's run, trained first.

    Attributes:
        arm: the other arm, of the same scale and seed.
    """

    arm: str

    def __str__(self) -> str:
        """What stands for the folder where nothing says where it is."""
        return f"<finished run of arm {self.arm}>"


@dataclasses.dataclass(frozen=True)
class Published:
    """Numbers of a paper.

    Attributes:
        source: paper and table.
        scale: of its experiment, in words.
        metric: what the numbers are, in words.
        values: by arm, as printed; arms that it does not have are left out.
        measures: the metric of a record that is the same quantity, of other data; none if there
            is no such metric, as for accuracies.
        negated: the paper prints minus this quantity, as a negative log perplexity is minus a loss.
    """

    source: str
    scale: str
    metric: str
    values: Mapping[str, float]
    measures: str | None = None
    negated: bool = False

    @property
    def measured(self) -> dict[str, float]:
        """The values with the sign of the metric that is measured here."""
        return {arm: -value if self.negated else value for arm, value in self.values.items()}

    def effect(self, metric: str, low: str, high: str) -> float | None:
        """Returns ``high - low`` of a metric as far as it is printed, else none."""
        values = self.measured
        if metric != self.measures or not {low, high} <= values.keys():
            return None
        return round(values[high] - values[low], 6)


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a paper says of two arms, to be tested here.

    Attributes:
        text: in words, with its source.
        metric: a name in ``METRICS`` of ``moe_jax.ablation.records`` or ``DERIVED`` of
            ``moe_jax.ablation.derived``.
        low: the arm where the metric is said to be lower.
        high: the other arm.
        margin: by more than this; with ``within``, apart by at most this.
        within: the claim is that the two are about equal.
        published: the paper's effect ``high - low`` in this metric, where the ablation's
            ``published`` does not have both arms.
        paper: where that stands, or what stands there instead of a number.
    """

    text: str
    metric: str
    low: str
    high: str
    margin: float = 0.0
    within: bool = False
    published: float | None = None
    paper: str = ""


@dataclasses.dataclass(frozen=True)
class Effect:
    """What is published of a claim.

    Attributes:
        value: ``high - low`` in the claim's metric; none if no number is printed.
        source: where; empty if nothing is published.
    """

    value: float | None
    source: str

    def __str__(self) -> str:
        number = "" if self.value is None else f"{self.value:+.4g}"
        return ", ".join(part for part in (number, self.source) if part)


@dataclasses.dataclass(frozen=True)
class Ablation:
    """A table of a paper, made again.

    Attributes:
        name: of its folder of results.
        title: one line.
        base: makes the configuration that all arms start from.
        arms: settings by dotted name that make each arm; a function makes one from the
            configuration at its scale, and ``Finished`` is the folder of another arm's run.
        scales: settings of each scale of ``SCALES``; sizes and budgets, never what arms set.
        seeds: how many; a seed fixes data order and the weights that arms share.
        metric: what figures show, a name in ``moe_jax.ablation.records.METRICS``.
        published: what papers report.
        claims: what is tested.
        threshold_arm: the arm whose last training loss the others are timed to; none if empty.
        against: what else than steps the training loss is drawn against.
        overlay: published series and laws to draw the metric with.
        notes: what was tried to explain a contradiction, and what else must be known.
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
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        named = [arm for claim in self.claims for arm in (claim.low, claim.high)]
        named += [arm for paper in self.published for arm in paper.values]
        named += [self.threshold_arm] if self.threshold_arm else []
        named += self.overlay.places if self.overlay else []
        named += [other for arm in self.arms for other in self.finished(arm).values()]
        for arm in named:
            self.check_arm(arm)
        for arm in self.arms:
            self._refuse_circles(arm)
        arms = [item for settings in self.arms.values() for item in settings.items()]
        fixed = {key for key, value in arms if not callable(value)}
        for scale, settings in self.scales.items():
            if scale not in SCALES:
                raise ConfigError(f"{self.name}: scale {scale!r}{nearest(scale, SCALES)}")
            both = fixed & settings.keys()
            if both:
                raise ConfigError(f"{self.name}: scale {scale} changes {min(both)}, as arms do")

    def check_arm(self, arm: str) -> None:
        """Refuses an arm that does not exist.

        Raises:
            ConfigError: naming the nearest one.
        """
        if arm not in self.arms:
            raise ConfigError(f"{self.name} has no arm {arm!r}{nearest(arm, self.arms)}")

    def effect(self, claim: Claim) -> Effect:
        """Returns what is published of a claim: what it says itself, or else the first paper."""
        if claim.published is not None or claim.paper:
            return Effect(claim.published, claim.paper)
        for paper in self.published:
            value = paper.effect(claim.metric, claim.low, claim.high)
            if value is not None:
                return Effect(value, paper.source)
        return Effect(None, "")

    def finished(self, arm: str) -> dict[str, str]:
        """Returns the arms whose finished runs an arm needs, by the setting that names them."""
        settings = self.arms[arm].items()
        return {name: value.arm for name, value in settings if isinstance(value, Finished)}

    def _refuse_circles(self, arm: str) -> None:
        found, rest = set(), list(self.finished(arm).values())
        while rest:
            other = rest.pop()
            if other == arm:
                raise ConfigError(f"{self.name}: arm {arm!r} needs its own finished run")
            if other not in found:
                found.add(other)
                rest += self.finished(other).values()

    def config(self, arm: str, scale: str = "cpu", seed: int = 0) -> ConfigDict:
        """Returns the configuration of one run; what is ``Finished`` is left to an override.

        Raises:
            ConfigError: if there is no such arm or scale.
        """
        self.check_arm(arm)
        if scale not in self.scales:
            raise ConfigError(f"{self.name} has no scale {scale!r}{nearest(scale, self.scales)}")
        config = self.base()
        config.name = "ablation"  # one name, so that equal runs of two ablations are the same run
        for settings in (self.scales[scale], self.arms[arm]):
            made = {key: v(config) if callable(v) else v for key, v in settings.items()}
            values = {k: str(v) if isinstance(v, Finished) else v for k, v in made.items()}
            override(Experiment, config, values)
        config.training.seed = config.data.seed = seed
        return config

    def experiment(self, arm: str, scale: str = "cpu", seed: int = 0) -> Experiment:
        """Returns the same, typed and checked."""
        return build(Experiment, self.config(arm, scale, seed))

    def get_config(self, argument: str = "") -> ConfigDict:
        """Returns the configuration for ``--config=FILE:ARM[,SCALE[,SEED]]`` of any command."""
        parts = (argument or next(iter(self.arms))).split(",")
        return self.config(*parts[:2], seed=int(parts[2]) if len(parts) > 2 else 0)
