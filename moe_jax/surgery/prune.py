"""Choice of the experts that a pruned model keeps, by a score of each expert."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from moe_jax.errors import ConfigError
from moe_jax.models import ModelConfig
from moe_jax.surgery.mixture import (
    LayerName,
    MixtureLayer,
    check_changeable,
    feed_forward_layers,
    mixtures,
    named,
    neighbours_of,
    reads_logits,
    with_arrays,
    with_logits_before,
    with_mixtures,
)
from moe_jax.surgery.weights import LayerWeights

Scores = Mapping[LayerName, Float[np.ndarray, " E"]]
Kept = Mapping[LayerName, Sequence[int]]


def prune(weights: LayerWeights, kept: Kept) -> LayerWeights:
    """Returns the model with only the listed experts of each layer.

    Args:
        weights: The model.
        kept: Indices of the experts that stay, by layer; other layers keep all experts.

    Raises:
        ConfigError: If a layer does not exist, or its router cannot work with so few experts.
    """
    check_changeable(weights)
    return with_mixtures(weights, _kept(weights, weights, kept))


def _kept(
    weights: LayerWeights, numbers: LayerWeights, kept: Kept
) -> dict[LayerName, MixtureLayer]:
    """Returns the layers of ``numbers``, such as moments, with the listed experts alone."""
    found = named(mixtures(numbers), kept)
    taken = {name: sorted(set(experts)) for name, experts in kept.items()}
    changed = {name: found[name].take(experts) for name, experts in taken.items()}
    return with_logits_before(weights, changed, taken)


@dataclasses.dataclass(frozen=True)
class Pruning:
    """A change that leaves experts out, as a ``FollowedChange``.

    Attributes:
        kept: Indices of the experts that stay, by layer.
    """

    kept: Kept

    def __call__(self, weights: LayerWeights) -> tuple[LayerWeights, str]:
        """Returns the model with only the kept experts, and why its function differs."""
        return prune(weights, self.kept), "experts are left out"

    def average(self, tree: str, average: LayerWeights, weights: LayerWeights) -> LayerWeights:
        """Returns the average of the kept experts' parameters."""
        del tree, weights
        return prune(average, self.kept)

    def moments(self, tree: str, moments: LayerWeights, weights: LayerWeights) -> LayerWeights:
        """Returns the moments of the kept experts and of their logits."""
        del tree
        return with_arrays(moments, _kept(weights, moments, self.kept))


def reduced_model(
    weights: LayerWeights, experts: int, *, across: bool = False
) -> ModelConfig | None:
    """Returns the configuration of a model with fewer experts, before they are selected.

    Args:
        weights: The model.
        experts: Number of experts that a layer keeps; the mean over layers if ``across``.
        across: Whether the experts of all layers are compared.

    Returns:
        The configuration, or ``None`` if a text decides on the number of experts of a layer.

    Raises:
        ConfigError: If the model cannot have so few experts; see ``check_each``.
    """
    check_number(weights, experts, across=across)
    if across:
        return None
    any_scores = {name: np.zeros(m.num_experts) for name, m in mixtures(weights).items()}
    kept = best(any_scores, experts, None, neighbours_of(weights))
    return prune(dataclasses.replace(weights, arrays={}), kept).model


def check_number(weights: LayerWeights, experts: int, *, across: bool = False) -> None:
    """Rejects a number of experts to which a layer cannot be reduced; see ``check_each``."""
    check_each(weights, experts, _with_number, across=across)


def _with_number(mixture: MixtureLayer, experts: int) -> MixtureLayer:
    return mixture.with_settings(num_experts=experts)


def check_each(
    weights: LayerWeights,
    experts: int,
    trial: Callable[[MixtureLayer, int], object],
    *,
    across: bool = False,
) -> None:
    """Rejects a number of experts to which a trial cannot reduce a layer.

    Args:
        weights: The model.
        experts: Number of experts that a layer keeps; the mean over layers if ``across``.
        trial: Function that raises ``ConfigError`` for a layer that cannot be reduced to a number
            of experts.
        across: Whether the experts of all layers are compared.

    Raises:
        ConfigError: If a layer, or the mean layer, has no more experts than that, if a trial fails,
            or if experts are to be compared over layers that cannot have any number of experts.
    """
    check_changeable(weights)
    found = mixtures(weights)
    numbers: dict[str, float] = {f"layer {n} has": m.num_experts for n, m in found.items()}
    if across:
        _check_unequal(weights, trial)
        numbers = {"a layer has on average": sum(numbers.values()) / len(numbers)}
    for words, number in numbers.items():
        if not 0 < experts < number:
            raise ConfigError(
                f"experts={experts}, and {words} {number:g}: keep at least 1 and fewer than it has"
            )
    for name, mixture in found.items():
        try:
            trial(mixture, experts)
        except ConfigError as error:
            raise ConfigError(f"experts={experts} in layer {name}: {error}") from error


def _check_unequal(weights: LayerWeights, trial: Callable[[MixtureLayer, int], object]) -> None:
    """Rejects models whose layers cannot differ in any way in their number of experts.

    Raises:
        ConfigError: If a router reads the logits of the MoE layer before, or needs a multiple, such
            as of its groups of experts.
    """
    for layer in feed_forward_layers(weights):
        if reads_logits(layer):
            raise ConfigError(
                f"the router of layer {layer.name} reads the logits of the MoE layer before, so "
                "all layers keep equally many experts: do not compare them across layers"
            )
    for name, mixture in mixtures(weights).items():
        least = _fewest(mixture, trial)
        for experts in range(least, mixture.num_experts):
            try:
                trial(mixture, experts)
            except ConfigError as error:
                raise ConfigError(
                    f"the router of layer {name} can have {least} experts and not {experts} "
                    f"({error}): do not compare them across layers"
                ) from error


def _fewest(mixture: MixtureLayer, trial: Callable[[MixtureLayer, int], object]) -> int:
    """Returns the least number of experts that a trial accepts; the layer's own at most."""
    for experts in range(1, mixture.num_experts):
        try:
            trial(mixture, experts)
        except ConfigError:
            continue
        return experts
    return mixture.num_experts


def best_of_layer(score: Float[np.ndarray, " E"], experts: int, groups: int = 1) -> list[int]:
    """Returns the experts of highest score of a layer, in order; ties keep lower indices.

    Args:
        score: Score of each expert.
        experts: Number of experts to return.
        groups: Number of groups of neighbouring experts, of which each keeps equally many.
    """
    inside = np.asarray(score).reshape(groups, -1)
    order = np.argsort(-inside, axis=1, kind="stable")[:, : experts // groups]
    return sorted((order + inside.shape[1] * np.arange(groups)[:, None]).ravel().tolist())


def best_of_all_layers(
    scores: Scores, experts: int, least: Mapping[LayerName, int]
) -> dict[LayerName, list[int]]:
    """Returns the experts of highest score over all layers together.

    Args:
        scores: Scores that can be compared between layers.
        experts: Mean number of experts that a layer keeps.
        least: Number of experts that each layer keeps in any case, such as its ``k``.

    Raises:
        ConfigError: If the layers keep more experts in any case.
    """
    total = experts * len(scores)
    if sum(least.values()) > total:
        raise ConfigError(
            f"experts={experts} keeps {total} experts over {len(scores)} layers, but the routers "
            f"need {sum(least.values())}: keep more"
        )
    kept = {name: best_of_layer(of, least[name]) for name, of in scores.items()}
    rest = [
        (-float(value), order, index, name)
        for order, (name, of) in enumerate(scores.items())
        for index, value in enumerate(of)
        if index not in kept[name]
    ]
    for _, _, index, name in sorted(rest)[: total - sum(least.values())]:
        kept[name].append(index)
    return {name: sorted(of) for name, of in kept.items()}


def best(
    scores: Scores,
    experts: int,
    least: Mapping[LayerName, int] | None,
    neighbours: Mapping[LayerName, int],
) -> dict[LayerName, list[int]]:
    """Returns the experts of highest score of all layers together, or of each layer.

    Args:
        scores: Score of each expert, by layer.
        experts: Number of experts that a layer keeps; the mean over layers with ``least``.
        least: Number of experts that each layer keeps in any case; ``None`` compares the experts
            of each layer alone.
        neighbours: Number of groups of neighbouring experts of a layer, which stay equally large;
            without ``least``.

    Raises:
        ConfigError: If the layers keep more experts in any case.
    """
    if least is not None:
        return best_of_all_layers(scores, experts, least)
    return {name: best_of_layer(of, experts, neighbours[name]) for name, of in scores.items()}


def fewest(weights: LayerWeights) -> dict[LayerName, int]:
    """Returns the number of experts that each layer's router needs at least."""
    return {name: _fewest(mixture, _with_number) for name, mixture in mixtures(weights).items()}
