"""Trinity (Arcee AI 2025, 2602.17004): windows in three of four layers, sigmoid gates on attention.

The sizes, windows and scales of the gates are those of the releases' config.json, as two
independent surveys of Trinity Nano, Mini and Large quote them.
"""

from ml_collections import ConfigDict
from moe_jax.configs import common
from moe_jax.configs.families import open_models

SOURCE = "2602.17004, abstract"


def trinity(
    name: str,
    *,
    layers: int,
    width: int,
    heads: tuple[int, int, int],
    dense: int,
    window: int,
    experts: tuple[int, int],
    dims: tuple[int, int],
    scale: float,
) -> ConfigDict:
    """Returns a Trinity model.

    Args:
        name: Name of the model.
        layers: Number of layers.
        width: Model width.
        heads: Number of query heads, number of key and value heads, and width of a head.
        dense: Number of dense layers, which come first.
        window: Number of tokens that a layer with a window sees.
        experts: Number of experts, and of experts per token.
        dims: Hidden widths of a dense layer and of an expert.
        scale: Sum of the gates of a token.
    """
    config = open_models.decoder(name, layers=layers, width=width, heads=heads)
    model = config.model
    mlp_dim, expert_dim = dims
    num_experts, k = experts
    model.update(mlp_dim=mlp_dim, scale_embedding=True)
    model.norm.update(eps=1e-5, place="both")
    details = {"qk_norm": "head", "output_gate": True}
    model.attention.update(window=window, **details)
    model.attention_overrides = ({"every": 4, "rotary": False, "details": details},)
    sparse = tuple(range(dense, layers))
    model.moe.update(layers=sparse, num_experts=num_experts, expert_dim=expert_dim)
    model.moe.shared.hidden = expert_dim
    model.moe.router = common.router("deepseek_v3", k=k, groups=1, keep_groups=1, scale=scale)
    config.data.update(vocab_size=200192, seq_length=4096, batch_size=1024)
    return config
