"""The forward pass of any model, without the modules that look ahead, and its stacks of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtyping import Array, Float

from moe_jax.errors import ConfigError
from moe_jax.models import Decoder, EncoderDecoder, Model
from moe_jax.models.config import SparseLayer
from moe_jax.models.stack import Stack
from moe_jax.nn.mode import Mode
from moe_jax.nn.moe import MoEAux
from moe_jax.routing import SoftSlots

Batch = Mapping[str, Array]


def stacks(model: Model) -> tuple[Stack, ...]:
    """Returns the stacks of a model in the order of their reports."""
    if isinstance(model, EncoderDecoder):
        return model.encoder, model.decoder
    assert isinstance(model, Decoder)
    return (model.layers,)


def sparse_layers(model: Model) -> tuple[SparseLayer, ...]:
    """Returns the layers with experts in the order of their reports, lookahead modules excluded."""
    return model.config.sparse_layers()[: sum(stack.num_sparse for stack in stacks(model))]


def check_separate(layers: Sequence[SparseLayer], verb: str) -> None:
    """Rejects layers whose experts take mixtures of tokens.

    Args:
        layers: Layers with experts.
        verb: What the caller does with a model, for the message.

    Raises:
        ConfigError: If a layer has soft slots.
    """
    for layer in layers:
        if isinstance(layer.moe.router.select, SoftSlots):
            raise ConfigError(
                f"the experts of layer {layer.name} take mixtures of all tokens (SoftSlots), so no "
                f"token has experts of its own: {verb} a model whose slots hold one token each"
            )


def forward(
    model: Model, batch: Batch, mode: Mode
) -> tuple[Float[Array, "B L M"], tuple[MoEAux, ...]]:
    """Returns the hidden states that the head reads, and one report per MoE layer.

    Args:
        model: Decoder or encoder-decoder.
        batch: Fields ``inputs``, ``segments`` and ``positions``, each ``(B, L)``; an
            encoder-decoder also reads ``encoder_inputs`` and ``encoder_segments`` ``(B, T)``.
        mode: Mode of the forward pass.
    """
    if isinstance(model, EncoderDecoder):
        reading = model.read(batch, mode=mode)
        return reading.hidden, reading.reports
    assert isinstance(model, Decoder)
    return model.hidden(batch["inputs"], batch["segments"], batch["positions"], mode=mode)
