"""Models: stacks of blocks with an embedding below and a head above."""

import jax

from moe_jax.models.config import AttentionOverride, ModelConfig, Reading, SparseLayer
from moe_jax.models.decoder import Decoder, DecoderConfig
from moe_jax.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from moe_jax.models.stored import Stored, stored

Model = Decoder | EncoderDecoder


def make(config: ModelConfig, vocab_size: int, key: jax.Array) -> Model:
    """Returns the model that ``config`` describes, with parameters drawn from ``key``."""
    kind = EncoderDecoder if isinstance(config, EncoderDecoderConfig) else Decoder
    return kind(config, vocab_size, key)


__all__ = [
    "AttentionOverride",
    "Decoder",
    "DecoderConfig",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "Model",
    "ModelConfig",
    "Reading",
    "SparseLayer",
    "Stored",
    "make",
    "stored",
]
