"""Students of a mixture: a dense model or a smaller mixture, made of the teacher's experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moe_jax.errors import ConfigError
from moe_jax.models import ModelConfig, SparseLayer
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.surgery.evidence import Use
from moe_jax.surgery.merge import Merging, cosines, groups_of, merged_experts
from moe_jax.surgery.mixture import (
    LayerName,
    check_changeable,
    feed_forward_layers,
    mixtures,
    neighbours_of,
    prefix,
)
from moe_jax.surgery.networks import INPUTS, added, gated, projected, scaled, side_by_side, widened
from moe_jax.surgery.prune import best_of_layer
from moe_jax.surgery.weights import LayerWeights

Uses = Mapping[LayerName, Use]
Start = Literal["merge", "prune"]
Groups = tuple[tuple[int, ...], ...]


def groups(use: Use, experts: int, start: Start, neighbours: int = 1) -> Int[np.ndarray, " E"]:
    """Returns the group ``(E,)`` of each expert, with the most used experts as heads.

    Args:
        use: Statistics of the layer on the text of the student.
        experts: Number of groups.
        start: ``merge`` puts every other expert into the group of the most similar head;
            ``prune`` leaves the others out (-1).
        neighbours: See ``groups_of``.
    """
    group = groups_of(use.load, cosines(use.logits), experts, neighbours)
    if start == "prune":
        heads = best_of_layer(use.load, experts, neighbours)
        group[np.setdiff1d(np.arange(len(group)), heads)] = -1
    return group


def _of_layers(
    weights: LayerWeights, uses: Uses, experts: int, start: Start
) -> dict[LayerName, Int[np.ndarray, " E"]]:
    """Returns the groups of the experts of each layer of a smaller mixture."""
    near = neighbours_of(weights)
    return {name: groups(use, experts, start, near[name]) for name, use in uses.items()}


def routing_groups(weights: LayerWeights, uses: Uses, experts: int, start: Start) -> Groups:
    """Returns the group of each logit of the teacher, by MoE layer; free experts stay.

    Args:
        weights: The teacher.
        uses: Statistics of its layers.
        experts: Number of experts of each layer of the student.
        start: See ``groups``.
    """
    return _with_free(weights, _of_layers(weights, uses, experts, start), experts)


def any_groups(weights: LayerWeights, experts: int) -> Groups:
    """Returns groups as ``routing_groups`` has them, for a check of settings without a text."""
    each = {n: np.arange(m.num_experts) % experts for n, m in mixtures(weights).items()}
    return _with_free(weights, each, experts)


def _with_free(
    weights: LayerWeights, found: Mapping[LayerName, Int[np.ndarray, " E"]], experts: int
) -> Groups:
    """Returns the groups with free experts, which have a group each."""
    free = {name: m.moe.router.free.count for name, m in mixtures(weights).items()}
    return tuple(
        (*of.tolist(), *range(experts, experts + free[name])) for name, of in found.items()
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
    chosen = _of_layers(weights, uses, experts, start)
    loads = {name: use.load for name, use in uses.items()}
    return Merging(chosen, loads, redirect=False)(weights)[0]


def dense(weights: LayerWeights, uses: Uses, experts: int, start: Start) -> LayerWeights:
    """Returns a model without experts: one dense network takes the place of each MoE layer.

    The network has the hidden units of the groups of experts, and those of shared experts, side by
    side. Every gate is its mean over all tokens, so that the network computes the MoE layer in
    which each token has these gates. Free experts are left out. All dense networks of the model get
    the width of the widest one; the output weights of their new units are zero.

    Args:
        weights: The teacher, which ``dense_model`` accepts.
        uses: Statistics of its layers.
        experts: Number of groups of each layer.
        start: See ``groups``; with ``prune``, gates are scaled to the sum of all.
    """
    arrays = {n: a for n, a in weights.arrays.items() if "/feed_forward/" not in n}
    networks = _dense_networks(weights)
    layers = feed_forward_layers(weights)
    for layer in layers:
        place, use = f"params/{prefix(layer)}", uses[layer.name]
        held = {**_under(weights, place), "norm/scale": arrays.get(_norm(layer))}
        networks[place] = one_network(layer.moe, held, use, groups(use, experts, start))
        if layer.moe.shared.norms:  # The new network contains the scales of its inputs.
            arrays[_norm(layer)] = jnp.ones_like(arrays[_norm(layer)])
    model = dense_model(weights, experts)
    if len(_kinds(weights)) > 1:
        networks = {p: gated(one, model.mlp_up_offset) for p, one in networks.items()}
    for index, (place, one) in enumerate(networks.items()):
        wide = widened(one, model.mlp_dim, jax.random.key(index))
        arrays |= {f"{place}{name}": array for name, array in wide.items()}
    return dataclasses.replace(weights, model=model, arrays=arrays)


def dense_model(weights: LayerWeights, experts: int) -> ModelConfig:
    """Returns the configuration of the model without experts that ``dense`` makes.

    Args:
        weights: The teacher.
        experts: Number of groups of each layer.

    Raises:
        ConfigError: If a layer has fewer experts, if the experts cannot be taken apart, or if no
            dense network computes a layer.
    """
    _check_student(weights, experts)
    widths = [one["down"].shape[0] for one in _dense_networks(weights).values()]
    for layer in feed_forward_layers(weights):
        held = _under(weights, f"params/{prefix(layer)}")
        shared = held["shared/network/down"].shape[0] if layer.moe.shared.hidden else 0
        widths.append(experts * held["experts/down"].shape[1] + shared)
    changes: dict[str, Any] = {
        layer.setting: MoEConfig(every=0) for layer in feed_forward_layers(weights)
    }
    kinds = _kinds(weights)
    if len(kinds) > 1:  # Networks that get a gate also get biases.
        changes["mlp_bias"] = True
    return dataclasses.replace(weights.model, **changes, gated=True in kinds, mlp_dim=max(widths))


def one_network(
    moe: MoEConfig, arrays: Mapping[str, Any], use: Use, group: Int[np.ndarray, " E"]
) -> dict[str, Array]:
    """Returns the dense network that computes an MoE layer of constant gates.

    Args:
        moe: Configuration of the layer.
        arrays: Parameters of the layer by name, such as ``experts/up (E, M, F)``, with the scale
            ``norm/scale (M,)`` of the layer's norm if shared experts have norms.
        use: Statistics of the layer.
        group: Group of each expert, from 0; -1 for an expert without group.

    Returns:
        The parameters by name, such as ``up (M, F)``.
    """
    outputs = use.mix / np.maximum(use.tokens, 1) * (1 - moe.final_mask)
    routed = _routed(moe, arrays, use, group)
    if not moe.shared.hidden:
        return scaled(routed, 1, outputs[0])
    shared = {n: arrays[f"shared/network/{n}"] for n in routed}
    if not moe.shared.norms:
        return added([scaled(routed, 1, outputs[0]), scaled(shared, 1, outputs[1])])
    after = [arrays[f"shared/{n}/scale"] for n in ("routed_norm", "output_norm")]
    routed = scaled(routed, arrays["norm/scale"], after[0] * outputs[0])
    return added([routed, scaled(shared, arrays["shared/norm/scale"], after[1] * outputs[1])])


def _routed(
    moe: MoEConfig, arrays: Mapping[str, Any], use: Use, group: Int[np.ndarray, " E"]
) -> dict[str, Array]:
    """Returns the network that adds up the groups of experts with constant gates."""
    experts = {n.removeprefix("experts/"): a for n, a in arrays.items() if n.startswith("experts/")}
    _, merged = merged_experts(experts, group, use.load)
    factors = mean_gates(use, group)
    if moe.router.gate_on == "in":  # A gate multiplies the input of the tokens that an expert has.
        factors, load = means(use.load, use.tokens, group), _sums(use.load, group)
        inputs = np.where(load > 0, _sums(use.gate, group) / np.maximum(load, 1), 1)
        merged |= {n: merged[n] * inputs[:, None, None] for n in INPUTS if n in merged}
    network = side_by_side(merged, factors * (1 - moe.expert_mask))
    if not moe.latent_dim:
        return network
    return projected(network, arrays["latent/down"], arrays["latent/up"])


def mean_gates(use: Use, group: Int[np.ndarray, " E"]) -> Float[np.ndarray, " G"]:
    """Returns the mean over all tokens of each group's gate; experts without group are divided up.

    Args:
        use: Statistics of the layer.
        group: Group of each expert, from 0; -1 for an expert without group.
    """
    return means(use.gate, use.tokens, group)


def means(
    sums: Float[np.ndarray, " E"], tokens: Float[np.ndarray, ""], group: Int[np.ndarray, " E"]
) -> Float[np.ndarray, " G"]:
    """Returns the mean over all tokens of a number of each group, scaled to the sum of all experts.

    Args:
        sums: Sum over all tokens of the number of each expert, such as its gate.
        tokens: Number of tokens.
        group: Group of each expert, from 0; -1 for an expert without group.
    """
    found = _sums(sums, group)
    return found * sums.sum() / max(found.sum() * tokens, np.finfo(np.float64).tiny)


def _sums(
    of_experts: Float[np.ndarray, " E"], group: Int[np.ndarray, " E"]
) -> Float[np.ndarray, " G"]:
    held = group >= 0
    return np.bincount(group[held], of_experts[held], minlength=int(group.max()) + 1)


def _dense_networks(weights: LayerWeights) -> dict[str, dict[str, Array]]:
    """Returns the networks of the dense layers, by the beginning of their names."""
    ending = "/feed_forward/down"
    places = [n.removesuffix("down") for n in weights.arrays if n.endswith(ending)]
    return {place: _under(weights, place) for place in places}


def _under(weights: LayerWeights, start: str) -> dict[str, Array]:
    return {n.removeprefix(start): a for n, a in weights.arrays.items() if n.startswith(start)}


def _norm(layer: SparseLayer) -> str:
    """Returns the name of the scale of a layer's norm."""
    return f"params/{prefix(layer).removesuffix('/')}_norm/scale"


def _kinds(weights: LayerWeights) -> set[bool]:
    """Returns whether networks are gated: True, False or both."""
    starts = [f"params/{prefix(layer)}experts/" for layer in feed_forward_layers(weights)]
    return {f"{start}gate" in weights.arrays for start in [*starts, *_dense_networks(weights)]}


def _check_student(weights: LayerWeights, experts: int) -> None:
    """Rejects a number of groups that a layer does not have, and layers that no network computes.

    Raises:
        ConfigError: If so, or if the experts cannot be taken apart.
    """
    check_changeable(weights)
    for name, found in mixtures(weights).items():
        if not 0 < experts <= found.num_experts:
            raise ConfigError(
                f"experts={experts}, and layer {name} has {found.num_experts}: use a number from "
                f"1 to {found.num_experts}"
            )
    _check_networks(weights)


def _check_networks(weights: LayerWeights) -> None:
    """Rejects layers that no dense network computes.

    Raises:
        ConfigError: If there is one.
    """
    mixture, norm = "use --student=mixture", weights.model.norm
    for layer in feed_forward_layers(weights):
        if layer.moe.extra_dense != "none":
            raise ConfigError(
                f"layer {layer.name} has a dense sub-layer beside its experts "
                f"(moe.extra_dense={layer.moe.extra_dense}), which only an MoE layer has: {mixture}"
            )
        if layer.moe.shared.norms and (norm.kind != "rms" or norm.place == "output"):
            raise ConfigError(
                f"the shared experts of layer {layer.name} have norms (moe.shared.norms), which a "
                f"dense network contains only with norm.kind=rms and norm.place=input or both: "
                f"{mixture}"
            )
    if len(_kinds(weights)) > 1 and weights.model.mlp_limit:
        raise ConfigError(
            f"model.mlp_limit={weights.model.mlp_limit} bounds gated units, and the model has "
            f"networks with and without gates: {mixture}"
        )
