"""GShard's multilingual translation models (Lepikhin et al. 2020, 2006.16668)."""

from ml_collections import ConfigDict
from moe_jax.configs import common

from moe_jax.models import EncoderDecoderConfig


def m4(name: str, layers: int, experts: int) -> ConfigDict:
    """Returns a model of ``layers`` in both stacks together; every other layer has ``experts``."""
    config = common.base(name, EncoderDecoderConfig())
    config.model.update(
        encoder_layers=layers // 2,
        decoder_layers=layers // 2,
        width=1024,
        num_heads=16,
        head_dim=128,
        mlp_dim=8192,
        activation="relu",
        dropout=0.1,
        remat="full",
    )
    for stack in (config.model.encoder_moe, config.model.decoder_moe):
        stack.update(every=2, num_experts=experts, expert_dim=8192)
        stack.router = common.router("gshard")
    config.data.update(vocab_size=96_000, seq_length=128, target_length=128)
    config.data.batch_size = 4_000_000 // 256 if experts == 2048 else 1_000_000 // 256
    common.adafactor(config, learning_rate=1.0)
    return config
