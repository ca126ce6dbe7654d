"""DeepSeekMoE's comparison at 2B parameters: DeepSeekMoE (Dai et al. 2024, 2401.06066, table 1)."""

from ml_collections import ConfigDict
from moe_jax.configs import common
from moe_jax.configs.families import dsmoe

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 2.0e9, 0.06, "DeepSeekMoE table 1"),
    PublishedNumber("training_flops_per_sequence.full", 4.3e12, 0.012, "DeepSeekMoE table 1"),
)


def get_config() -> ConfigDict:
    return dsmoe.two_billion(
        "dsmoe_2b_fine",
        common.router("deepseek_moe", k=7, balance_weight=0.01),
        num_experts=63,
        expert_dim=1280,
        shared={"hidden": 1280},
    )
