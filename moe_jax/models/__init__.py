"""Models: stacks of blocks with an embedding below and a head above."""

from jaxtyping import PRNGKeyArray

from moe_jax.models.adapters import add_adapters
from moe_jax.models.config import AttentionOverride, ModelConfig, Reading, SparseLayer
from moe_jax.models.decoder import Decoder, DecoderConfig
from moe_jax.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from moe_jax.models.stored import Stored, stored

Model = Decoder | EncoderDecoder


def make(config: ModelConfig, vocab_size: int, key: PRNGKeyArray) -> Model:
    """Returns the model that ``config`` describes, with parameters drawn from ``key``.

    Raises:
        TypeError: If no model has a configuration of this class.
    """
    model: Model
    if isinstance(config, EncoderDecoderConfig):
        model = EncoderDecoder(config, vocab_size, key)
    elif isinstance(config, DecoderConfig):
        model = Decoder(config, vocab_size, key)
    else:
        raise TypeError(f"no model has the configuration class {type(config).__name__}")
    if config.lora is not None:
        add_adapters(model, config.lora, key)
    return model


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
