"""ERNIE-4.5-21B-A3B (Baidu 2025): 64 experts and two shared ones after a dense layer.

The sizes are the defaults of Ernie4_5_MoeConfig in transformers. PaddlePaddle/ERNIE has the same
sizes in examples/pre-training/model_configs/ERNIE-4p5-21B-A3B, with two layers that it removes and
with the base 10000 of the positions in place of 500000.
"""

from ml_collections import ConfigDict
from moe_jax.configs.families import ernie_4_5, open_models

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 21e9, 0.05, "name of the model"),
    PublishedNumber("active.no_input_embedding", 3e9, 0.12, "name of the model"),
)


def get_config() -> ConfigDict:
    config = open_models.decoder("ernie_4.5_21b_a3b", layers=28, width=2560, heads=(20, 4, 128))
    config.model.update(mlp_dim=12288, tie_embeddings=True)
    return ernie_4_5.experts(config, dense=1, expert_dim=1536, k=6, shared=2)
