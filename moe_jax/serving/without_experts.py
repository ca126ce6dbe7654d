"""A model whose experts are not on the device: its step calls the host in their place."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Primitive
from jaxtyping import Array, Bool, Float

from moe_jax.errors import ConfigError
from moe_jax.grouped import Blocks, Choices, GateOn, sum_of_found
from moe_jax.models import Decoder
from moe_jax.nn.feed_forward import FeedForwardConfig
from moe_jax.nn.moe import ConfiguredMoE, taken_by
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.router import RouterLayer
from moe_jax.offload import experts_of
from moe_jax.serving.resident import by_choice

# The experts of one layer: (tokens, token, weight, place, sizes, found) to found, see ``Blocks``.
EXPERTS = Primitive("experts_on_host")
# The tokens of a router, beside ones (T, E) where the next router would choose an expert.
FORESEEN = Primitive("foreseen")
EXPERTS.def_abstract_eval(lambda *operands, **_: operands[5])
FORESEEN.def_abstract_eval(lambda tokens, chosen: tokens)


@dataclasses.dataclass(frozen=True)
class ExpertWork:
    """The work of the host at one mark.

    Attributes:
        layer: Index of the MoE layer among the MoE layers.
        config: Configuration of one expert.
        sizes: Numbers of rows of a block.
        gate_on: Gates scale the ``in``puts, the ``out``puts, or nothing.
    """

    layer: int
    config: FeedForwardConfig
    sizes: tuple[int, ...]
    gate_on: GateOn


class OffloadedExperts(nnx.Module):
    """Experts without parameters, which the host applies between two segments of a step."""

    def __init__(self, config: FeedForwardConfig, layer: int, number: int):
        """Names the experts.

        Args:
            config: Configuration of one expert.
            layer: Index of the MoE layer among the MoE layers.
            number: Number ``E`` of experts.
        """
        self.config, self.layer, self.number = config, layer, number

    def on_choices(
        self,
        tokens: Float[Array, "T M"],
        gate: Float[Array, "T K"],
        choices: Choices,
        gate_on: GateOn = "out",
    ) -> Float[Array, "T M"]:
        """Returns the sums of the outputs of sorted choices; see ``moe_jax.grouped.on_choices``."""
        del gate  # ``choices`` has the gates in the order of the rows.
        blocks = Blocks.of(tokens, choices)
        empty = jnp.zeros((len(blocks.token), self.config.width), tokens.dtype)
        operands = (*jax.tree.leaves(blocks), choices.place, choices.sizes, empty)
        work = ExpertWork(self.layer, self.config, blocks.sizes, gate_on)
        return sum_of_found(EXPERTS.bind(*operands, work=work), choices)


class ForeseeingRouter(nnx.Module):
    """A router that notes which experts the next router would choose for the same tokens."""

    def __init__(self, own: RouterLayer, following: RouterLayer):
        """Holds both routers."""
        self.own, self.following = own, following

    def __call__(self, x: Float[Array, "G S M"], **inputs: Any) -> Any:
        """Returns what the own router returns; see ``RouterLayer``."""
        plan, _ = self.following(x, **(inputs | {"carried": None, "record": None}))
        taken = taken_by(plan).reshape(-1, self.following.num_experts)
        return self.own(FORESEEN.bind(x, taken.astype(jnp.float32)), **inputs)

    def sequence_losses(
        self, plan: Any, valid: Bool[Array, "B L"], settings: Any = None
    ) -> dict[str, Float[Array, " B"]]:
        """Returns the losses of the own router; see ``RouterLayer``."""
        return self.own.sequence_losses(plan, valid, settings)


def without_experts(model: Decoder) -> Decoder:
    """Returns a model with the same outputs, whose experts the host applies; no layer is stacked.

    Args:
        model: Decoder; it stays as it is, and shares the arrays of all other parameters.

    Raises:
        ConfigError: If a layer has experts that the host cannot apply one by one.
    """
    model = jax.tree.map(lambda leaf: leaf, model)
    configs = [experts.config for experts in experts_of(model)]
    for blocks in model.layers.parts:
        for layer in (layer for block in blocks for layer in block.mixtures.values()):
            layer.config = _checked(layer.config)
            layer.experts = nnx.Dict()
    model.layers = model.layers.unrolled()
    model.layers.remat = "none"
    layers: list[Any] = list(_mixtures(model))  # Their parts become parts of other kinds.
    followers = [*layers, None][1:]
    for index, (layer, following) in enumerate(zip(layers, followers, strict=True)):
        layer.experts = OffloadedExperts(configs[index], index, layer.config.num_experts)
        if following is not None:
            layer.router = ForeseeingRouter(layer.router, following.router)
    return model


def _mixtures(model: Decoder) -> Iterator[ConfiguredMoE]:
    """Yields every MoE layer of a model without stacked layers, in order."""
    for view in model.layers.layers():
        yield from view.block.mixtures.values()


def _checked(config: MoEConfig) -> MoEConfig:
    """Returns the settings of a layer with a transport that computes choices."""
    config = by_choice(config)
    if config.transport != "ragged":
        raise ConfigError(
            "offloading computes choices without slots, and a layer needs slots (experts choose "
            "tokens, or expert_dropout or expert_mask is set): serve the model without a budget"
        )
    return config
