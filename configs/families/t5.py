"""T5 and the models built on it: encoder-decoders with 512 input and 114 target tokens.

The sizes are from Fedus et al. 2021 (2101.03961, table 9) and from flaxformer's released
configurations, which match the public checkpoints.
"""

from ml_collections import ConfigDict
from moe_jax.configs import common

from moe_jax.config.schema import settings
from moe_jax.data import Spans
from moe_jax.models import EncoderDecoderConfig


def t5(name: str, layers: int, width: int, heads: int, mlp_dim: int, **model) -> ConfigDict:
    """Returns a dense model with ``layers`` in each stack."""
    config = common.base(name, EncoderDecoderConfig())
    config.model.update(
        encoder_layers=layers,
        decoder_layers=layers,
        width=width,
        num_heads=heads,
        head_dim=64,
        mlp_dim=mlp_dim,
        activation="relu",
        compute_dtype="bfloat16",
        remat="full",
        dropout=0.0,
        init_scale=1.0,
        scale_embedding=False,
    )
    config.model.update(model)
    config.model.scale_head = config.model.tie_embeddings
    config.model.attention.scale = 1.0
    for stack in (config.model.encoder_moe, config.model.decoder_moe):
        stack.every = 0
    # 32,000 pieces, 100 sentinels, and 28 more ids for a round number.
    config.data.spans = settings(Spans())
    config.data.update(
        source="c4/en", vocab_size=32028, seq_length=512, target_length=114, batch_size=2048
    )
    config.training.steps = 500_000
    config.training.z_loss = 1e-4
    common.adafactor(config, learning_rate=1.0)
    return config


def sparse(config: ConfigDict, router: ConfigDict, **moe) -> ConfigDict:
    """Adds equally many experts to both stacks; an expert is as wide as a dense layer."""
    for stack in (config.model.encoder_moe, config.model.decoder_moe):
        stack.every = 2
        stack.expert_dim = config.model.mlp_dim
        stack.update(moe)
        stack.router = router
    config.model.init_scale = 0.1
    return config


def switch(name: str, experts: int, *, capacity: tuple[float, float], base: ConfigDict, **moe):
    """Returns ``base`` with Switch layers and the capacity factors of training and evaluation."""
    base.name = name
    router = common.router(
        "switch_t5x", capacity_factor=capacity[0], eval_capacity_factor=capacity[1]
    )
    return sparse(base, router, num_experts=experts, **moe)


def base_size(name: str) -> ConfigDict:
    """Returns T5-Base, 223M parameters."""
    return t5(name, layers=12, width=768, heads=12, mlp_dim=3072)


def large_size(name: str) -> ConfigDict:
    """Returns T5-Large."""
    return t5(name, layers=24, width=1024, heads=16, mlp_dim=4096)


def xxl_size(name: str) -> ConfigDict:
    """Returns T5 v1.1 XXL, with gated layers and untied embeddings."""
    return t5(
        name,
        layers=24,
        width=4096,
        heads=64,
        mlp_dim=10240,
        activation="gelu",
        gated=True,
        tie_embeddings=False,
    )


def flaxformer(name: str, layers: int, width: int, heads: int, mlp_dim: int, **moe) -> ConfigDict:
    """Returns a gated, untied model with the top-2 routing of flaxformer.

    In the encoder, tokens with higher scores take slots first.
    """
    base = t5(
        name,
        layers,
        width,
        heads,
        mlp_dim,
        activation="gelu",
        gated=True,
        tie_embeddings=False,
    )
    sparse(base, common.router("switch_t5x", k=2), group_size=4096, **moe)
    base.model.encoder_moe.router = common.router("switch_t5x", k=2, priority="score")
    return base


def switch_base(name: str, experts: int) -> ConfigDict:
    """Returns Switch-Base, which was released with 8 to 256 experts."""
    return switch(name, experts, capacity=(1.25, 2.0), base=base_size(name), group_size=8192)
