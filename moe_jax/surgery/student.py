"""Students of a mixture: a dense model or a smaller mixture, made of the teacher's experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moe_jax.errors import ConfigError
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.surgery.evidence import Use
from moe_jax.surgery.merge import cosines, groups_of, merge, merged_experts
from moe_jax.surgery.mixture import (
    UNITS,
    LayerName,
    check_changeable,
    feed_forward_layers,
    mixtures,
    prefix,
    with_mixtures,
)
from moe_jax.surgery.weights import LayerWeights

Uses = Mapping[LayerName, Use]
Start = Literal["merge", "prune"]
Groups = tuple[tuple[int, ...], ...]


def groups(use: Use, experts: int, start: Start) -> Int[np.ndarray, " E"]:
    """Returns the group ``(E,)`` of each expert, with the most used experts as heads.

    Args:
        use: Statistics of the layer on the text of the student.
        experts: Number of groups.
        start: ``merge`` puts every other expert into the group of the most similar head;
            ``prune`` leaves the others out (-1).
    """
    group = groups_of(use.load, cosines(use.logits), experts)
    if start == "prune":
        heads = np.argsort(-use.load, kind="stable")[:experts]
        group[np.setdiff1d(np.arange(len(group)), heads)] = -1
    return group


def routing_groups(weights: LayerWeights, uses: Uses, experts: int, start: Start) -> Groups:
    """Returns the group of each logit of the teacher, by MoE layer; free experts stay.

    Args:
        weights: The teacher.
        uses: Statistics of its layers.
        experts: Number of experts of each layer of the student.
        start: See ``groups``.
    """
    free = {name: m.moe.router.free.count for name, m in mixtures(weights).items()}
    return tuple(
        (*groups(use, experts, start).tolist(), *range(experts, experts + free[name]))
        for name, use in uses.items()
    )


def smaller(weights: LayerWeights, uses: Uses, experts: int, start: Start) -> LayerWeights:
    """Returns the mixture whose layers have one expert per group.

    Args:
        weights: The teacher.
        uses: Statistics of its layers.
        experts: Number of experts of each layer.
        start: See ``groups``.

    Raises:
        ConfigError: If a router cannot work with so few experts.
    """
    found = mixtures(weights)
    new = {n: merge(found[n], groups(use, experts, start), use.load) for n, use in uses.items()}
    return with_mixtures(weights, new)


def dense(weights: LayerWeights, uses: Uses, experts: int, start: Start) -> LayerWeights:
    """Returns a model without experts, whose dense networks are the groups side by side.

    Each network has the hidden units of all its groups. The output weights of a group are
    multiplied by the mean of its gate over all tokens, so that the network computes the mixture
    that has these gates for every token.

    Args:
        weights: The teacher.
        uses: Statistics of its layers.
        experts: Number of groups of each layer.
        start: See ``groups``; with ``prune``, gates are scaled to the sum of all.

    Raises:
        ConfigError: If the dense networks do not fit the model, such as beside other dense layers
            of another width, or beside shared experts.
    """
    arrays, layers, found = dict(weights.arrays), feed_forward_layers(weights), mixtures(weights)
    for layer in layers:
        use, of_layer = uses[layer.name], prefix(layer)
        group = groups(use, experts, start)
        _, merged = merged_experts(found[layer.name].experts, group, use.load)
        for name in [n for n in arrays if n.partition("/")[2].startswith(of_layer)]:
            if name.partition("/")[2].removeprefix(of_layer).startswith(("experts/", "router/")):
                del arrays[name]
        network = side_by_side(merged, mean_gates(use, group))
        arrays |= {f"params/{of_layer}{name}": array for name, array in network.items()}
    widths = {found[layer.name].moe.expert_dim * experts for layer in layers}
    changes: dict[str, Any] = {layer.setting: MoEConfig(every=0) for layer in layers}
    model = dataclasses.replace(weights.model, **changes, mlp_dim=max(widths))
    student = dataclasses.replace(weights, model=model, arrays=arrays)
    _check_shapes(student, max(widths))
    return student


def mean_gates(use: Use, group: Int[np.ndarray, " E"]) -> Float[np.ndarray, " G"]:
    """Returns the mean over all tokens of each group's gate; experts without group are divided up.

    Args:
        use: Statistics of the layer.
        group: Group of each expert, from 0; -1 for an expert without group.
    """
    held = group >= 0
    gates = np.bincount(group[held], use.gate[held], minlength=int(group.max()) + 1)
    return gates * use.gate.sum() / max(gates.sum() * use.tokens, np.finfo(np.float64).tiny)


def side_by_side(experts: Mapping[str, Array], gates: Float[np.ndarray, " G"]) -> dict[str, Array]:
    """Returns a dense network that adds up experts with constant gates.

    Args:
        experts: Parameters ``(G, ...)`` by name, such as ``up (G, M, F)``.
        gates: Gate of each expert.

    Returns:
        The parameters by name, such as ``up (M, G * F)``.
    """
    network = {}
    for name, array in experts.items():
        if name.startswith("down"):
            array = array * jnp.asarray(gates, array.dtype)[:, None, None]
        joined = jnp.concatenate(list(array), UNITS[name]) if name in UNITS else array.sum(0)
        network[name] = joined[0] if name.endswith("_bias") else joined
    return network


def check_student(weights: LayerWeights, experts: int) -> None:
    """Rejects a number of groups that a layer does not have.

    Raises:
        ConfigError: If so, or if the experts cannot be taken apart.
    """
    check_changeable(weights)
    for name, mixture in mixtures(weights).items():
        if not 0 < experts <= mixture.num_experts:
            raise ConfigError(
                f"experts={experts}, and layer {name} has {mixture.num_experts}: use a number from "
                f"1 to {mixture.num_experts}"
            )


def _check_shapes(student: LayerWeights, width: int) -> None:
    found = {name: tuple(array.shape) for name, array in student.arrays.items()}
    described = student.shapes
    differing = [n for n in {**described, **found} if described.get(n) != found.get(n)]
    if differing:
        raise ConfigError(
            f"{differing[0]} does not fit a dense model of mlp_dim={width}: the teacher has other "
            "dense layers, shared experts or a latent width; use student='mixture'"
        )
