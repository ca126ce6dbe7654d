"""NLLB-MoE for 202 languages (NLLB team 2022, 2207.04672): every fourth layer has experts."""

from ml_collections import ConfigDict
from moe_jax.configs.families import fairseq

from moe_jax.counting import PublishedNumber

PUBLISHED = (PublishedNumber("total", 54.5e9, 0.002, "NLLB section 8"),)


def get_config() -> ConfigDict:
    config = fairseq.translation(
        "nllb_moe_54b", 24, 2048, 16, 8192, every=4, num_experts=128, expert_mask=0.2
    )
    for stack in (config.model.encoder_moe, config.model.decoder_moe):
        stack.router.update(second="all", pad_mask=True)
    config.data.update(vocab_size=256206, seq_length=512, target_length=512)
    return config
