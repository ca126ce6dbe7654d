"""The contribution of each expert to the output of its layer, for every token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moe_jax.analysis.forward import Batch, forward, stacks
from moe_jax.analysis.removal import removed_from
from moe_jax.models import Model
from moe_jax.models.stack import Stack
from moe_jax.nn.mode import Mode
from moe_jax.nn.moe import ConfiguredMoE, MoEAux
from moe_jax.nn.shared import SharedConfig

_RECORD = Mode("full", record=True)
# Arguments of an MoE layer, besides the tokens, that its output depends on.
_READ = ("token_ids", "carried", "residual")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Contributions:
    """The parts that the experts of one MoE layer add to the output of each token.

    Attributes:
        experts: Expert ``(B, L, K)`` of each choice; negative where the token has no such expert.
        gates: Combine weight ``(B, L, K)`` of each choice.
        norms: Euclidean norm ``(B, L, K)`` of the expert's part of the experts' sum, before the
            shared network weights or normalises it.
        others: Norm ``(B, L)`` of the layer's output if no expert adds a part to it.
        output: Norm ``(B, L)`` of the layer's output.
        error: Norm ``(B, L)`` of the difference between the layer's output and the output that the
            sum of the parts gives, with the shared network computed anew.
    """

    experts: Int[Array, "B L K"]
    gates: Float[Array, "B L K"]
    norms: Float[Array, "B L K"]
    others: Float[Array, "B L"]
    output: Float[Array, "B L"]
    error: Float[Array, "B L"]


class Watched(nnx.Module):
    """An MoE layer that shows a function its arguments, its output and its report."""

    def __init__(self, mixture: ConfiguredMoE, see: Callable[..., None]):
        """Wraps a layer; ``see`` gets the layer, its call's arguments, its output and report."""
        self.mixture = mixture
        self.see = see

    def __call__(self, x: Array, valid: Array, **given: Any) -> tuple[Array, MoEAux]:
        """Returns the output of the layer and its report; see ``ConfiguredMoE``."""
        y, aux = self.mixture(x, valid, **given)
        self.see(self.mixture, x, valid, given, y, aux)
        return y, aux


@jax.jit
def hidden_and_contributions(
    model: Model, batch: Batch
) -> tuple[Float[Array, "B L M"], tuple[Contributions, ...]]:
    """Returns the hidden states for the head, and the contributions in each MoE layer in order.

    No token is dropped. Experts that choose tokens choose among each row.

    Args:
        model: Decoder or encoder-decoder.
        batch: Fields of ``moe_jax.analysis.forward``.
    """
    found: list[Contributions] = []

    def see(
        mixture: ConfiguredMoE, x: Array, valid: Array, given: dict[str, Any], y: Array, aux: MoEAux
    ) -> None:
        read = {name: given[name] for name in _READ if name in given}
        found.append(_contributions(mixture, x, valid, read, y, aux))

    hidden, _ = forward(watch(model, see), batch, _RECORD)
    return hidden, tuple(found)


def watch(model: Model, see: Callable[..., None]) -> Model:
    """Returns a copy of a model that runs layer by layer and shows its MoE layers to ``see``.

    The copy shares its parameters with the model.
    """
    copy = jax.tree.map(lambda leaf: leaf, model)
    for stack in stacks(copy):
        _watch(stack, see)
    return copy


def _watch(stack: Stack, see: Callable[..., None]) -> None:
    """Makes a stack run every layer by itself and show its MoE layers to ``see``."""
    blocks = []
    for layer in stack.layers():
        block = jax.tree.map(lambda leaf: leaf, layer.take(layer.block))
        for name in ("attention_experts", "feed_forward"):
            mixture = getattr(block, name, None)
            if isinstance(mixture, ConfiguredMoE):
                nnx.Module.__setattr__(block, name, Watched(mixture, see))
        blocks.append(block)
    stack.parts = nnx.List(nnx.List([block]) for block in blocks)
    stack.repeats, stack.remat = (1,) * len(blocks), "none"


def _contributions(
    mixture: ConfiguredMoE,
    x: Array,
    valid: Array,
    read: dict[str, Any],
    y: Array,
    aux: MoEAux,
) -> Contributions:
    """Measures the layer with one choice of every token at a time, and without any choice.

    The shared network combines the sum of the parts with its own output, as the layer does.
    """
    assert aux.choices is not None and aux.gates is not None  # The mode records them.
    experts = jnp.arange(mixture.config.num_experts)
    router = mixture.router

    def without(removed: Array) -> Array:
        copy = jax.tree.map(lambda leaf: leaf, mixture)
        # A norm in the shared network reads the sum of all experts, so the parts are before it.
        copy.config = dataclasses.replace(mixture.config, shared=SharedConfig())
        removed_from(copy, router, removed)
        return copy(x, valid, mode=_RECORD, **read)[0].astype(jnp.float32)

    def combined(routed: Array) -> Array:
        if mixture.config.shared.hidden:
            routed = mixture.shared(x, routed.astype(y.dtype), valid, None, read.get("residual"))[0]
        return routed.astype(jnp.float32)

    nothing = without(jnp.ones((*valid.shape, len(experts)), bool))

    def of_choice(choice: Array) -> Array:
        return without(choice[..., None] != experts) - nothing

    choices = jnp.moveaxis(aux.choices, -1, 0)
    parts = jax.lax.map(of_choice, choices)
    output = y.astype(jnp.float32)
    return Contributions(
        jnp.where(valid[..., None], aux.choices, -1),
        aux.gates,
        jnp.moveaxis(_norm(parts), 0, -1),
        _norm(combined(nothing)),
        _norm(output),
        _norm(combined(parts.sum(0) + nothing) - output),
    )


def _norm(x: Array) -> Array:
    return jnp.linalg.norm(x, axis=-1)
