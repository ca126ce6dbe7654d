"""Removes experts from single tokens of a model: the model without a contribution."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Bool

from moe_jax.analysis.forward import stacks
from moe_jax.errors import ConfigError
from moe_jax.models import Model
from moe_jax.nn.block import Block
from moe_jax.nn.groups import into_groups
from moe_jax.nn.moe import ConfiguredMoE
from moe_jax.nn.router import RouterLayer
from moe_jax.routing import Plan, Slots


class RemovedChoices(nnx.Variable):
    """Mask ``(B, L, E)`` of the tokens that a router's experts do not get."""


class RouterWithout(nnx.Module):
    """A router whose plans lack some pairs of token and expert; the other gates are unchanged."""

    def __init__(self, router: RouterLayer, removed: Bool[Array, "*R B L E"]):
        """Wraps a router.

        Args:
            router: Router of one layer, or the stacked routers of ``R`` layers.
            removed: Mask ``(B, L, E)``, or one per stacked layer, True for a pair to remove.
        """
        self.inner = router
        self.removed = RemovedChoices(removed, axes=(None, None, None))

    def __call__(self, x: Array, **context: Any) -> tuple[Plan, Array | None]:
        """Returns the plan and the values for the next router; see ``RouterLayer``."""
        plan, carried = self.inner(x, **context)
        removed = into_groups(self.removed[...], x.shape[1], False)
        if not isinstance(plan.slots, Slots):
            raise ConfigError("slots that mix tokens have no choices that can be removed")
        return dataclasses.replace(plan, slots=plan.slots.without(removed)), carried

    def sequence_losses(
        self, plan: Plan, valid: Array, settings: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """Returns the losses per sequence; see ``RouterLayer``."""
        return self.inner.sequence_losses(plan, valid, settings)


def removed_from(mixture: ConfiguredMoE, router: RouterLayer, removed: Array) -> None:
    """Makes an MoE layer lack the pairs of token and expert that ``removed (B, L, E)`` marks."""
    nnx.Module.__setattr__(mixture, "router", RouterWithout(router, removed))


def model_without(model: Model, removed: Sequence[Bool[Array, "B L E"]]) -> Model:
    """Returns a copy of a model that lacks some pairs of token and expert.

    The copy shares its parameters with the model. The experts' outputs are removed for these tokens
    alone, and no other gate changes.

    Args:
        model: The model.
        removed: Mask ``(B, L, E)`` per MoE layer in order, True for a pair to remove.
    """
    copy = jax.tree.map(lambda leaf: leaf, model)
    rest = list(removed)
    for stack in stacks(copy):
        own, rest = rest[: stack.num_sparse], rest[stack.num_sparse :]
        mixtures = [m for blocks in stack.parts for block in blocks for m in mixtures_of(block)]
        for mixture, (router, mask) in zip(mixtures, stack.with_routers(own), strict=True):
            removed_from(mixture, router, mask)
    return copy


def mixtures_of(block: Block) -> list[ConfiguredMoE]:
    """Returns the MoE layers of a block in the order of ``Block.routers``."""
    layers = (getattr(block, "attention_experts", None), block.feed_forward)
    return [layer for layer in layers if isinstance(layer, ConfiguredMoE)]
