"""Merges experts by weighted means of aligned hidden units (M-SMoE, Li et al. 2024, 2310.01334)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.optimize import linear_sum_assignment

from moe_jax.models import ModelConfig
from moe_jax.surgery.mixture import (
    UNITS,
    LayerName,
    MixtureLayer,
    mixtures,
    with_arrays,
    with_logits_before,
    with_mixtures,
)
from moe_jax.surgery.prune import best_of_layer, check_each
from moe_jax.surgery.weights import LayerWeights


def groups_of(
    usage: Float[np.ndarray, " E"],
    similarity: Float[np.ndarray, "E E"],
    experts: int,
    neighbours: int = 1,
) -> Int[np.ndarray, " E"]:
    """Returns the group ``(E,)`` of each expert; groups are numbered by the index of their head.

    The ``experts`` most used experts are heads of groups. Every other expert joins the head to
    which it is most similar.

    Args:
        usage: Number of tokens of each expert.
        similarity: Similarity of each pair of experts, such as the cosine of their logits.
        experts: Number of groups.
        neighbours: Number of groups of neighbouring experts to which the router restricts tokens.
            Each has equally many heads, and an expert joins a head of its own neighbours.
    """
    heads = np.asarray(best_of_layer(usage, experts, neighbours))
    place = np.arange(len(usage)) // (len(usage) // neighbours)
    near = np.where(place[:, None] == place[heads], similarity[:, heads], -np.inf)
    group = np.argmax(near, axis=1)
    group[heads] = np.arange(experts)
    return group


def merge(
    mixture: MixtureLayer,
    group: Int[np.ndarray, " E"],
    usage: Float[np.ndarray, " E"],
    aligned_by: Mapping[str, Array] | None = None,
) -> MixtureLayer:
    """Returns the layer with one expert for each group.

    The most used expert of a group is its head. The hidden units of the other members are
    permuted to match the head, and the parameters are means weighted by usage. The router keeps the
    logit of the head and sends tokens to the merged expert by this logit.

    Args:
        mixture: The layer.
        group: Group of each expert, from 0; -1 leaves an expert out.
        usage: Number of tokens of each expert; a group without tokens has equal weights.
        aligned_by: Parameters of the experts that give the order of units; ``None`` for those of
            the layer.

    Raises:
        ConfigError: If the router cannot work with so few experts.
    """
    experts = aligned_by or mixture.experts
    heads, merged = merged_experts(experts, group, usage, mixture.experts)
    return dataclasses.replace(mixture.take(heads), experts=merged)


def merge_redirected(
    mixture: MixtureLayer,
    group: Int[np.ndarray, " E"],
    usage: Float[np.ndarray, " E"],
    aligned_by: Mapping[str, Array] | None = None,
) -> MixtureLayer:
    """Returns the layer with one expert for each group, and all logits of the old router.

    A token chooses among all old experts, and the choice of a member goes to the merged expert of
    its group, as in the paper. The router's parameters and state do not change.

    Args:
        mixture: The layer.
        group: Group of each expert, from 0.
        usage: Number of tokens of each expert; a group without tokens has equal weights.
        aligned_by: See ``merge``.

    Raises:
        ConfigError: If a part of the router needs one logit per expert.
    """
    experts = aligned_by or mixture.experts
    _, merged = merged_experts(experts, group, usage, mixture.experts)
    return dataclasses.replace(_redirecting(mixture, group), experts=merged)


def check_groups(weights: LayerWeights, experts: int, *, across: bool = False) -> None:
    """Rejects a number of groups that a layer with all its logits cannot have.

    Raises:
        ConfigError: If a part of a router needs one logit per expert; see also ``check_each``.
    """
    check_each(weights, experts, _with_groups, across=across)


def _with_groups(mixture: MixtureLayer, experts: int) -> MixtureLayer:
    """Returns the layer whose logits are those of ``experts`` groups; arrays stay."""
    return _redirecting(mixture, np.arange(mixture.num_experts) % experts)


def redirecting_model(
    weights: LayerWeights, experts: int, *, across: bool = False
) -> ModelConfig | None:
    """Returns the configuration of a model with merged experts and all logits; see ``prune``.

    Raises:
        ConfigError: See ``check_groups``.
    """
    check_groups(weights, experts, across=across)
    if across:
        return None
    bare = dataclasses.replace(weights, arrays={})
    merged = {name: _with_groups(mixture, experts) for name, mixture in mixtures(bare).items()}
    return with_mixtures(bare, merged).model


def _redirecting(mixture: MixtureLayer, group: Int[np.ndarray, " E"]) -> MixtureLayer:
    """Returns the layer whose logits are those of ``group.max() + 1`` experts; arrays stay."""
    router = dataclasses.replace(mixture.moe.router, redirect=tuple(int(g) for g in group))
    return mixture.with_settings(num_experts=int(group.max()) + 1, router=router)


@dataclasses.dataclass(frozen=True)
class Merging:
    """A change that merges the experts of each group, as a ``FollowedChange``.

    Attributes:
        groups: Group ``(E,)`` of each expert, by layer.
        usage: Number of tokens ``(E,)`` of each expert, by layer.
        redirect: True keeps the logits of all experts, False those of the heads of groups.
    """

    groups: Mapping[LayerName, Int[np.ndarray, " E"]]
    usage: Mapping[LayerName, Float[np.ndarray, " E"]]
    redirect: bool

    def __call__(self, weights: LayerWeights) -> tuple[LayerWeights, str]:
        """Returns the model with merged experts, and why its function differs."""
        return self._merged(weights, weights), "experts are merged"

    def _merged(self, arrays: LayerWeights, weights: LayerWeights) -> LayerWeights:
        """Returns the merged model of ``arrays``, with the order of units of ``weights``."""
        found, order = mixtures(arrays), mixtures(weights)
        one = merge_redirected if self.redirect else merge
        merged = {
            name: one(found[name], group, self.usage[name], order[name].experts)
            for name, group in self.groups.items()
        }
        return with_mixtures(arrays, self._with_heads(arrays, merged))

    def _with_heads(
        self, weights: LayerWeights, merged: Mapping[LayerName, MixtureLayer]
    ) -> Mapping[LayerName, MixtureLayer]:
        """Returns merged layers whose routers read the logits of the heads in the layer before."""
        if self.redirect:
            return merged
        heads = {name: heads_of(group, self.usage[name]) for name, group in self.groups.items()}
        return with_logits_before(weights, merged, heads)

    def average(self, tree: str, average: LayerWeights, weights: LayerWeights) -> LayerWeights:
        """Returns the merged average, with the order of units of the parameters."""
        del tree
        return self._merged(average, weights)

    def moments(self, tree: str, moments: LayerWeights, weights: LayerWeights) -> LayerWeights:
        """Returns means of moments, with the shares and the order of units of the parameters."""
        del tree
        before, here, merged = mixtures(weights), mixtures(moments), {}
        for name, group in self.groups.items():
            parameters, numbers = before[name].experts, here[name].experts
            heads, experts = merged_experts(parameters, group, self.usage[name], numbers)
            routed = here[name] if self.redirect else here[name].take(heads)
            merged[name] = dataclasses.replace(routed, experts=experts)
        return with_arrays(moments, self._with_heads(weights, merged))


def heads_of(group: Int[np.ndarray, " E"], usage: Float[np.ndarray, " E"]) -> list[int]:
    """Returns the most used expert of each of ``G`` groups."""
    members = (np.flatnonzero(group == number) for number in range(int(group.max()) + 1))
    return [int(of[np.argmax(usage[of])]) for of in members]


def merged_experts(
    experts: Mapping[str, Array],
    group: Int[np.ndarray, " E"],
    usage: Float[np.ndarray, " E"],
    numbers: Mapping[str, Array] | None = None,
) -> tuple[list[int], dict[str, Array]]:
    """Returns the head of each of ``G`` groups, and the merged parameters ``(G, ...)``.

    Args:
        experts: Parameters ``(E, ...)`` of the experts by name.
        group: Group of each expert, from 0; -1 leaves an expert out.
        usage: Number of tokens of each expert; a group without tokens has equal weights.
        numbers: Other numbers of the parameters, such as moments, to merge with the order of units
            of the parameters; ``None`` merges the parameters. Some may be missing.
    """
    numbers = experts if numbers is None else numbers
    merged = []
    for number in range(int(group.max()) + 1):
        members = np.flatnonzero(group == number)
        members = members[np.argsort(-usage[members], kind="stable")]
        merged.append(_mean(experts, members, usage[members], numbers))
    arrays = {name: jnp.stack([one[name] for one in merged]) for name in numbers}
    return heads_of(group, usage), arrays


def _mean(
    experts: Mapping[str, Array],
    members: np.ndarray,
    usage: np.ndarray,
    numbers: Mapping[str, Array],
) -> dict[str, Array]:
    """Returns the mean of the members' numbers, aligned to the units of the first member."""
    total = usage.sum()
    shares = usage / total if total else np.full(len(members), 1 / len(members))
    head = {name: array[members[0]] for name, array in experts.items()}
    summed = {name: array[members[0]] * shares[0] for name, array in numbers.items()}
    for index, share in zip(members[1:], shares[1:], strict=True):
        other = {name: array[index] for name, array in experts.items()}
        order = alignment(head, other)
        for name, array in numbers.items():
            one, axis = array[index], UNITS.get(name)
            aligned = one if axis is None else jnp.take(one, order, axis=axis)
            summed[name] = summed[name] + share * aligned
    return summed


def alignment(one: Mapping[str, Array], other: Mapping[str, Array]) -> Int[np.ndarray, " F"]:
    """Returns the order ``(F,)`` of the units of ``other`` that fits the units of ``one`` best.

    The order maximises the sum of the products of all weights of matched units.

    Args:
        one: Parameters of an expert, such as ``up (M, F)`` and ``down (F, M)``.
        other: Parameters of another expert.
    """
    fit = sum(
        np.moveaxis(np.asarray(one[name], np.float64), axis, 0).reshape(one[name].shape[axis], -1)
        @ np.moveaxis(np.asarray(other[name], np.float64), axis, 0)
        .reshape(other[name].shape[axis], -1)
        .T
        for name, axis in UNITS.items()
        if name in one
    )
    return linear_sum_assignment(fit, maximize=True)[1]


def cosines(products: Float[np.ndarray, "E E"]) -> Float[np.ndarray, "E E"]:
    """Returns the cosine of each pair of vectors from their inner products."""
    norms = np.sqrt(np.maximum(np.diag(products), np.finfo(np.float64).tiny))
    return products / norms[:, None] / norms
