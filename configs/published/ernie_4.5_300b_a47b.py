"""ERNIE-4.5-300B-A47B (Baidu 2025): 64 experts after three dense layers.

The sizes are those of PaddlePaddle/ERNIE, examples/pre-training/model_configs/ERNIE-4p5-300B-A47B,
less the two layers that it removes; it leaves the default of Baidu, an untied head. The vocabulary
of the released weights and the base of the positions are those in the tests of MindIE's ernie_moe.
These tests tie the head; the printed total does not tell the two apart.
"""

from ml_collections import ConfigDict
from moe_jax.configs.families import ernie_4_5, open_models

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 300e9, 0.01, "name of the model"),
    PublishedNumber("active.no_input_embedding", 47e9, 0.01, "name of the model"),
)


def get_config() -> ConfigDict:
    config = open_models.decoder("ernie_4.5_300b_a47b", layers=54, width=8192, heads=(64, 8, 128))
    config.model.mlp_dim = 28672
    return ernie_4_5.experts(config, dense=3, expert_dim=3584, k=8, shared=0)
