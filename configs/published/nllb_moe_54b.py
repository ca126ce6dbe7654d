"""NLLB-MoE for 202 languages (NLLB team 2022, 2207.04672): every fourth layer has experts."""

from ml_collections import ConfigDict

from configs import common
from moe_jax.models import EncoderDecoderConfig
from moe_jax.planning import Claim

PUBLISHED = (Claim("total", 54.5e9, 0.002, "NLLB section 8"),)


def get_config() -> ConfigDict:
    config = common.base("nllb_moe_54b", EncoderDecoderConfig())
    model = config.model
    model.update(
        encoder_layers=24,
        decoder_layers=24,
        width=2048,
        num_heads=16,
        head_dim=128,
        mlp_dim=8192,
        activation="relu",
        mlp_bias=True,
        dropout=0.1,
    )
    model.norm.update(kind="layer", eps=1e-5, bias=True)
    model.positions = common.part("Sinusoidal")
    model.attention.update(qkv_bias=True, output_bias=True)
    for stack in (model.encoder_moe, model.decoder_moe):
        stack.update(every=4, num_experts=128, expert_dim=8192, expert_mask=0.2)
        stack.router = common.router("fairseq_top2", second="all", pad_mask=True)
    config.data.update(vocab_size=256206, seq_length=512, target_length=512)
    return config
