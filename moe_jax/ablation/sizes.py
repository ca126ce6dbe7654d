"""Measured arms and published scores by the size of the experts, for a figure of an ablation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from moe_jax.errors import ConfigError

# Size of the unchanged model.
WHOLE = 1.0


@dataclasses.dataclass(frozen=True)
class MeasuredSeries:
    """Arms of one method at several sizes.

    Attributes:
        method: Method that changes the model; series of one method have one colour.
        reference: Arm of the unchanged model, with as much training as the arms of the series.
        arms: Arm at each size, a share of the bytes of the reference's experts.
    """

    method: str
    reference: str
    arms: Mapping[float, str]


@dataclasses.dataclass(frozen=True)
class PublishedSeries:
    """Printed scores of one method at several sizes.

    Attributes:
        method: As in ``MeasuredSeries``.
        source: Paper, table, model and score.
        scores: Printed score at each size; a higher score is better. Size 1 has the score of the
            unchanged model.
    """

    method: str
    source: str
    scores: Mapping[float, float]

    def __post_init__(self) -> None:
        """Raises ConfigError if the unchanged model has no score, or one that is not positive."""
        if self.scores.get(WHOLE, 0.0) <= 0:
            raise ConfigError(f"{self.source}: the scores need a positive one at size 1")

    @property
    def relative(self) -> dict[float, float]:
        """Scores as shares of the unchanged model's, by size."""
        return {size: score / self.scores[WHOLE] for size, score in self.scores.items()}


@dataclasses.dataclass(frozen=True)
class QualityBySize:
    """Quality against size, measured and published.

    Losses and scores are not comparable, so each is shown relative to its unchanged model.

    Attributes:
        measured: Series of arms, by name.
        published: Series of printed scores, by name.
    """

    measured: Mapping[str, MeasuredSeries]
    published: Mapping[str, PublishedSeries] = dataclasses.field(default_factory=dict)

    @property
    def arms(self) -> Iterator[str]:
        """Arms that the measured series name."""
        for series in self.measured.values():
            yield from (series.reference, *series.arms.values())

    @property
    def methods(self) -> list[str]:
        """Methods of all series, in their order."""
        measured = [series.method for series in self.measured.values()]
        published = [series.method for series in self.published.values()]
        return list(dict.fromkeys(measured + published))
