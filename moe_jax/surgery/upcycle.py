"""Dense networks as the first experts of a mixture (sparse upcycling, 2212.05055)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from moe_jax.errors import ConfigError
from moe_jax.models import DecoderConfig, EncoderDecoderConfig, ModelConfig, SparseLayer
from moe_jax.nn.init import described
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.shared import SharedConfig
from moe_jax.routing import Bias, Router, Top2, TopK
from moe_jax.surgery.mixture import UNITS, LayerName, meant, prefix, router_axes
from moe_jax.surgery.weights import LayerWeights


@dataclasses.dataclass(frozen=True)
class Upcycling:
    """The mixture that takes the place of dense networks.

    Attributes:
        experts: Number ``E`` of experts per layer.
        router: Router of all layers.
        shards: Number of parts of equal width into which each dense network is cut (virtual groups,
            He et al. 2024, 2410.07524); an expert is one part, and 1 copies whole networks.
        layers: Layers that get experts, by index from 0 or, in an encoder-decoder, by name such as
            ``encoder 1``; an index alone means this layer of each stack. Empty for all layers.
        redrawn: Share of each expert's hidden units whose weights are drawn again
            (Drop-Upcycling, Nakamura et al. 2025, 2502.19261; the paper uses 0.5).
    """

    experts: int
    router: Router
    shards: int = 1
    layers: tuple[LayerName, ...] = ()
    redrawn: float = 0.0


def keeps_function(recipe: Upcycling) -> bool:
    """Returns whether the new model computes the function of the dense one where none is dropped.

    The chosen gates have to sum to a constant, and with shards each choice has to take all parts of
    a network equally often. Copies with equal logits are chosen together, so this holds if ``k`` is
    a multiple of ``shards``.
    """
    select = recipe.router.select
    if recipe.redrawn or recipe.router.gate_on == "in" or recipe.router.free.count:
        return False
    if isinstance(select, Top2):
        kept = select.second in ("all", "random", "sampling")
        return select.normalize and kept and recipe.shards in (1, 2)
    if not isinstance(select, TopK) or not select.normalize or select.expert_scale:
        return False
    ranked = select.rank is not None and not isinstance(select.rank, Bias)
    limited = select.limit is not None and select.limit.excludes
    equal = not ranked and not limited and select.k % recipe.shards == 0
    return recipe.shards == 1 or equal


def upcycle(weights: LayerWeights, recipe: Upcycling, key: PRNGKeyArray) -> LayerWeights:
    """Returns a model whose dense networks are mixtures of copies, or of parts of copies.

    Expert ``c * shards + s`` is part ``s`` of copy ``c``. The router is drawn for the copies, and
    all parts of a copy have its logit. The output weights are multiplied by ``shards``, and divided
    by the scale of the gates, so that the sum over the parts is the dense network.

    Args:
        weights: Dense decoder or encoder-decoder.
        recipe: The mixture.
        key: Random key of the routers and of the weights that are drawn again.

    Raises:
        ConfigError: If the model has experts already, a layer does not exist, or the numbers do
            not divide.
    """
    model = upcycled_config(weights, recipe)
    order = [layer.name for layer in _layers(weights.model)]
    arrays = dict(weights.arrays)
    for layer in model.sparse_layers():
        of_layer = _prefix(layer, model)
        start = f"params/{of_layer}"
        names = [name for name in arrays if name.startswith(start)]
        dense = {name.removeprefix(start): arrays.pop(name) for name in names}
        draws, heads = jax.random.split(jax.random.fold_in(key, order.index(layer.name)))
        for name, array in _experts(dense, recipe, draws).items():
            arrays[f"{start}experts/{name}"] = array
        for name, array in _router(recipe, model, heads).items():
            arrays[f"{start}router/{name}"] = array
        for name, parameter in recipe.router.free.parameters(model.width).items():
            heads = jax.random.fold_in(heads, 1)
            arrays[f"{start}free/{name}"] = described(parameter, heads, model.init_scale)[...]
        for name, shape in recipe.router.state_shapes(recipe.experts).items():
            arrays[f"router_state/{of_layer}router/state/{name}"] = jnp.zeros(shape, jnp.float32)
    return dataclasses.replace(weights, model=model, arrays=arrays)


def upcycled_config(weights: LayerWeights, recipe: Upcycling) -> ModelConfig:
    """Returns the configuration of the model that ``upcycle`` returns.

    Raises:
        ConfigError: See ``upcycle``.
    """
    model = weights.model
    if model.sparse_layers():
        raise ConfigError("the model has experts already: upcycling starts from a dense model")
    if recipe.shards < 1 or model.mlp_dim % recipe.shards:
        raise ConfigError(
            f"shards={recipe.shards} does not divide model.mlp_dim={model.mlp_dim}: change shards"
        )
    if recipe.experts % recipe.shards:
        raise ConfigError(
            f"shards={recipe.shards} does not divide experts={recipe.experts}: every copy of a "
            "network has all its parts; change one of them"
        )
    if not 0 <= recipe.redrawn <= 1:
        raise ConfigError(f"redrawn={recipe.redrawn} is not a share: use a number from 0 to 1")
    settings: dict[str, Any] = _settings(model, recipe)
    upcycled = dataclasses.replace(model, **settings)
    upcycled.check_layers()
    return upcycled


def _settings(model: ModelConfig, recipe: Upcycling) -> dict[str, Any]:
    """Returns the settings of the experts of each stack that gets any, by the setting's name.

    Raises:
        ConfigError: If a layer does not exist.
    """
    known = {layer.name: layer for layer in _layers(model) if _module(layer, model) < 0}
    for name in recipe.layers:
        if not meant(name, known):
            listed = ", ".join(map(str, known))
            raise ConfigError(f"layer {name} does not exist: the layers are {listed}")
    names = [one for name in recipe.layers for one in meant(name, known)]
    layers = [known[name] for name in names or known]
    return {
        setting: MoEConfig(
            every=MoEConfig().every if recipe.layers else 1,
            layers=tuple(one.index for one in layers if recipe.layers and one.setting == setting),
            num_experts=recipe.experts,
            expert_dim=model.mlp_dim // recipe.shards,
            group_size=getattr(model, setting).group_size,
            router=recipe.router,
            shared=SharedConfig(),
        )
        for setting in dict.fromkeys(layer.setting for layer in layers)
    }


def _layers(model: ModelConfig) -> tuple[SparseLayer, ...]:
    """Returns every layer of a model as a layer with experts; lookahead modules come last."""
    two = isinstance(model, EncoderDecoderConfig)
    settings: dict[str, Any] = dict.fromkeys(
        ("encoder_moe", "decoder_moe") if two else ("moe",), MoEConfig(every=1)
    )
    return dataclasses.replace(model, **settings).sparse_layers()


def _module(layer: SparseLayer, model: ModelConfig) -> int:
    """Returns the index of the module that looks ahead and holds a layer; negative for others."""
    return layer.index - model.num_layers if isinstance(model, DecoderConfig) else -1


def _prefix(layer: SparseLayer, model: ModelConfig) -> str:
    """Returns the beginning of the names of a layer's arrays, behind the name of their tree."""
    module = _module(layer, model)
    return prefix(layer) if module < 0 else f"lookahead/{module}/layers/0/feed_forward/"


def _experts(dense: Mapping[str, Array], recipe: Upcycling, key: PRNGKeyArray) -> dict[str, Array]:
    """Returns the experts' parameters ``(E, ...)`` from the parameters of a dense network."""
    copies = recipe.experts // recipe.shards
    scale = getattr(recipe.router.select, "scale", 1.0)
    experts = {}
    for name, array in dense.items():
        if name == "down_bias":
            parts = jnp.broadcast_to(array / scale, (recipe.shards, *array.shape))
        else:
            factor = recipe.shards / scale if name == "down" else 1.0
            parts = jnp.stack(jnp.split(array, recipe.shards, axis=UNITS[name])) * factor
        experts[name] = jnp.tile(parts, (copies, *(1,) * array.ndim))
    experts = redrawn(experts, recipe.redrawn, key)
    return {n: a[:, None] if n.endswith("_bias") else a for n, a in experts.items()}


def redrawn(experts: Mapping[str, Array], share: float, key: PRNGKeyArray) -> dict[str, Array]:
    """Returns experts in which a share of the hidden units is drawn again (Drop-Upcycling).

    The units of each expert are chosen anew. Their weights are normal, with the mean and the
    deviation of the old weights of these units, by name (2502.19261, section 3). Biases stay.

    Args:
        experts: Parameters ``(E, ...)`` by name; the hidden units are the last axis of ``up`` and
            ``gate``, and the second of ``down``.
        share: Share ``r`` of the units; ``floor(r * F)`` units of each expert are drawn.
        key: Random key.
    """
    count, units, _ = experts["down"].shape
    chosen = math.floor(share * units)
    if not chosen:
        return dict(experts)
    ranks = jnp.argsort(jax.random.uniform(key, (count, units)), axis=1)
    mask = ranks < chosen
    found = dict(experts)
    for step, (name, axis) in enumerate((("up", 1), ("gate", 1), ("down", 2))):
        if name not in found:
            continue
        old = found[name]
        replaced = jnp.broadcast_to(jnp.expand_dims(mask, axis), old.shape)
        mean, deviation = (
            f(old, axis=(1, 2), keepdims=True, where=replaced) for f in (jnp.mean, jnp.std)
        )
        drawn = mean + deviation * jax.random.normal(jax.random.fold_in(key, step), old.shape)
        found[name] = jnp.where(replaced, drawn, old)
    return found


def _router(recipe: Upcycling, model: ModelConfig, key: PRNGKeyArray) -> dict[str, Array]:
    """Returns the parameters of a router that has one logit for all parts of a copy."""
    router, copies = recipe.router, recipe.experts // recipe.shards
    axes = router_axes(router, model.width, recipe.experts)
    parameters = router.head.parameters(model.width, copies + router.free.count, router.planes)
    drawn: dict[str, Array] = {}
    for name, parameter in parameters.items():
        array = described(parameter, key, model.init_scale)[...]
        key = jax.random.fold_in(key, 1)
        for axis in axes[name]:
            array = _each_repeated(array, copies, recipe.shards, axis)
        drawn[name] = array
    return drawn


def _each_repeated(array: Array, copies: int, shards: int, axis: int) -> Array:
    """Returns the array with each of the first entries repeated; free experts follow them."""
    first, rest = jnp.split(array, [copies], axis=axis)
    return jnp.concatenate([jnp.repeat(first, shards, axis=axis), rest], axis=axis)
