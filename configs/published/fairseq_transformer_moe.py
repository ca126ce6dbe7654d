"""fairseq's translation transformer with experts in every other layer (branch ``moe``).

Base size of 1706.03762; no number of it is published.
"""

from ml_collections import ConfigDict

from configs import common
from moe_jax.models import EncoderDecoderConfig

PUBLISHED = ()


def get_config() -> ConfigDict:
    config = common.base("fairseq_transformer_moe", EncoderDecoderConfig())
    model = config.model
    model.update(
        encoder_layers=6,
        decoder_layers=6,
        width=512,
        num_heads=8,
        head_dim=64,
        mlp_dim=2048,
        activation="relu",
        mlp_bias=True,
        dropout=0.1,
    )
    model.norm.update(kind="layer", eps=1e-5, bias=True)
    model.positions = common.part("Sinusoidal")
    model.attention.update(qkv_bias=True, output_bias=True)
    for stack in (model.encoder_moe, model.decoder_moe):
        stack.update(every=2, num_experts=8, expert_dim=2048)
        stack.router = common.router("fairseq_top2")
    config.data.update(vocab_size=40000, seq_length=128, target_length=128)
    return config
