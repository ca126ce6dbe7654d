"""Models like Nemotron 3 (2512.20856): its MoE layers, with attention in place of Mamba-2.

A published model has about as many layers of Mamba-2 or attention as MoE layers, and its attention
has no positions. A model here is a stack of attention, with rotary positions, and MoE layers.
"""

from ml_collections import ConfigDict
from moe_jax.configs import common
from moe_jax.configs.families import open_models


def like(name: str, *, layers: int, width: int) -> ConfigDict:
    """Returns a decoder with squared ReLU and Nemotron 3's attention; the caller sets the experts.

    Args:
        name: Name of the model.
        layers: Number of MoE layers; each follows a layer of attention.
        width: Model width.
    """
    config = open_models.decoder(name, layers=layers, width=width, heads=(32, 2, 128))
    config.model.update(gated=False, activation="relu2")
    config.model.norm.eps = 1e-5
    config.data.update(vocab_size=131072, seq_length=8192, batch_size=3072)
    return config


def router(k: int, scale: float) -> ConfigDict:
    """Returns the router: DeepSeek-V3's, without groups."""
    return common.router("deepseek_v3", k=k, groups=1, keep_groups=1, scale=scale)
