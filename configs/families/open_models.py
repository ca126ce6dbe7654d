"""Decoders like Llama's whose weights are open: the settings that they share."""

from ml_collections import ConfigDict
from moe_jax.configs import common


def decoder(name: str, *, layers: int, width: int, heads: tuple[int, int, int]) -> ConfigDict:
    """Returns a decoder with gated units, without experts; the caller sets ``model.moe``.

    Args:
        name: Name of the model.
        layers: Number of layers.
        width: Model width.
        heads: Number of query heads, number of key and value heads, and width of a head.
    """
    config = common.base(name)
    num_heads, num_kv_heads, head_dim = heads
    config.model.update(
        num_layers=layers,
        width=width,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        gated=True,
        activation="silu",
        tie_embeddings=False,
        scale_embedding=False,
        compute_dtype="bfloat16",
        remat="full",
    )
    return config
