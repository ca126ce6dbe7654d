"""Models: stacks of blocks with an embedding below and a head above."""

from moe_jax.models.decoder import Decoder, DecoderConfig
from moe_jax.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig

__all__ = ["Decoder", "DecoderConfig", "EncoderDecoder", "EncoderDecoderConfig"]
