"""ERNIE 4.5 (Baidu 2025, technical report): dense layers, then layers with 64 experts."""

from ml_collections import ConfigDict
from moe_jax.configs import common


def experts(config: ConfigDict, *, dense: int, expert_dim: int, k: int, shared: int) -> ConfigDict:
    """Returns a decoder with experts in all layers after the first ``dense`` ones.

    Args:
        config: A decoder, see ``open_models.decoder``.
        dense: Number of dense layers.
        expert_dim: Hidden width of an expert.
        k: Number of experts per token.
        shared: Number of shared experts.
    """
    model = config.model
    model.norm.eps = 1e-5
    model.positions.update(base=5e5, interleaved=True)
    layers = tuple(range(dense, model.num_layers))
    model.moe.update(layers=layers, num_experts=64, expert_dim=expert_dim)
    model.moe.shared.hidden = shared * expert_dim
    model.moe.router = common.router("ernie4_5_moe", k=k)
    config.data.update(vocab_size=103424, seq_length=8192, batch_size=1024)
    return config
