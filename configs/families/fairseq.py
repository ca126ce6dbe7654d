"""fairseq's MoE models: language models (Artetxe et al. 2021, 2112.10684) and translation models.

The language models omit the biases of fairseq's linear maps (0.1 % of the parameters), because the
printed sizes do not include them.
"""

from ml_collections import ConfigDict
from moe_jax.configs import common

from moe_jax.models import EncoderDecoderConfig


def language_model(name: str, layers: int, width: int, heads: int) -> ConfigDict:
    """Returns a language model with 512 experts in every other layer and top-2 routing."""
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
    """Returns a top-2 encoder-decoder of ``layers`` per stack, with biases and layer norms."""
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
