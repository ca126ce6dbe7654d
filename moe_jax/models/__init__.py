"""Models: stacks of blocks with an embedding below and a head above."""

from moe_jax.models.decoder import Decoder, DecoderConfig

__all__ = ["Decoder", "DecoderConfig"]
