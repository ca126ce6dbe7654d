"""fairseq's mixture-of-experts models: language (Artetxe et al. 2021, 2112.10684), translation.

The language models are the closed form that gives the printed sizes: without the biases of
fairseq's linear maps, which add 0.1 %.
"""

from ml_collections import ConfigDict
from moe_jax.configs import common

from moe_jax.models import EncoderDecoderConfig


def language_model(name: str, layers: int, width: int, heads: int) -> ConfigDict:
    """Returns a model with 512 experts in every other layer, top-2."""
    config = common.base(name)
    model = config.model
    model.update(
        num_layers=layers,
        width=width,
        num_heads=heads,
        head_dim=width // heads,
        mlp_dim=4 * width,
        activation="gelu",
        dropout=0.1,
        compute_dtype="bfloat16",
        remat="full",
    )
    model.norm.update(kind="layer", eps=1e-5, bias=True)
    model.positions = common.part("Sinusoidal")
    model.moe.update(every=2, num_experts=512, expert_dim=4 * width)
    model.moe.router = common.router("fairseq_top2")
    config.data.update(vocab_size=50257, seq_length=2048, batch_size=512)
    return config


def translation(name: str, layers: int, width: int, heads: int, mlp_dim: int, **moe) -> ConfigDict:
    """Returns an encoder-decoder of ``layers`` each, with biases and layer norms, top-2."""
    config = common.base(name, EncoderDecoderConfig())
    model = config.model
    model.update(
        encoder_layers=layers,
        decoder_layers=layers,
        width=width,
        num_heads=heads,
        head_dim=width // heads,
        mlp_dim=mlp_dim,
        activation="relu",
        mlp_bias=True,
        dropout=0.1,
    )
    model.norm.update(kind="layer", eps=1e-5, bias=True)
    model.positions = common.part("Sinusoidal")
    model.attention.update(qkv_bias=True, output_bias=True)
    for stack in (model.encoder_moe, model.decoder_moe):
        stack.update(expert_dim=mlp_dim, **moe)
        stack.router = common.router("fairseq_top2")
    return config
