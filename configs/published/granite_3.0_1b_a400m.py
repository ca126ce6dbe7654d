"""Granite-3.0-1B-A400M (IBM 2024): 32 experts, and constant factors of branches and logits.

The sizes are those of the table in the model card of ibm-granite/granite-3.0-1b-a400m-instruct. The
factors, the tie, the base and the norms are those in the config.json of
allura-org/MoE-Girl_400MA_1BT, which was trained from ibm-granite/granite-3.0-1b-a400m-base. The
size of the vocabulary comes from a printed GraniteMoeForCausalLM of these sizes and granite-3.1.
"""

from ml_collections import ConfigDict
from moe_jax.configs import common
from moe_jax.configs.families import open_models

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 1.3e9, 0.04, "model card"),
    PublishedNumber("active.no_input_embedding", 400e6, 0.1, "model card"),
)


def get_config() -> ConfigDict:
    config = open_models.decoder("granite_3.0_1b_a400m", layers=24, width=1024, heads=(16, 8, 64))
    model = config.model
    model.update(mlp_dim=512, tie_embeddings=True)
    model.update(embedding_factor=12.0, residual_factor=0.22, logit_factor=1 / 6)
    model.attention.scale = 1 / 64
    model.moe.update(every=1, num_experts=32, expert_dim=512)
    model.moe.router = common.router("mixtral", k=8, balance_weight=1e-3)
    config.data.update(vocab_size=49155, seq_length=4096, batch_size=1024)
    return config
