"""GLM-4.5-Air (2508.06471): the settings that its releases share."""

from ml_collections import ConfigDict
from moe_jax.configs import common
from moe_jax.configs.families import open_models


def air(name: str, *, base: float, lookahead: int) -> ConfigDict:
    """Returns a model of GLM-4.5-Air's sizes.

    Args:
        name: Name of the model.
        base: Base of the rotations, which turn half of a head.
        lookahead: Number of lookahead modules.
    """
    config = open_models.decoder(name, layers=46, width=4096, heads=(96, 8, 128))
    model = config.model
    model.mlp_dim = 10944
    model.lookahead = lookahead
    model.norm.eps = 1e-5
    model.positions.update(base=base, share=0.5)
    model.attention.qkv_bias = True
    model.moe.update(layers=tuple(range(1, 46)), num_experts=128, expert_dim=1408)
    model.moe.shared.hidden = 1408
    model.moe.router = common.router("deepseek_v3", groups=1, keep_groups=1, scale=1.0)
    config.data.update(vocab_size=151552, seq_length=4096, batch_size=16384)
    return config
