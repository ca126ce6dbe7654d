"""T5's span corruption with a Switch encoder-decoder on the Python standard library.

15 % of each text is cut out in spans of three tokens and written down again (Raffel et al. 2020,
Fedus et al. 2021). Variants, as ``--config=span_corruption:NAME``: ``switch`` (default),
``dense`` (no experts) and ``expert_choice`` (experts choose in the encoder, where nothing leaks;
the decoder stays a Switch). All spend the same FLOPs per token.
"""

from ml_collections import ConfigDict
from moe_jax.configs import common

from moe_jax.config.schema import settings
from moe_jax.data import Spans
from moe_jax.models import EncoderDecoderConfig

VARIANTS = ("switch", "dense", "expert_choice")


def get_config(variant: str = "switch") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; known: {', '.join(VARIANTS)}")
    config = common.base(f"span-corruption-{variant}", EncoderDecoderConfig())
    # 256 inputs have 58 targets at most; 64 are whole groups.
    config.data.update(vocab_size=2048, seq_length=256, target_length=64, batch_size=8)
    # A run is shorter than an epoch; it sees rows of the whole library from its first step on.
    config.data.shuffle_window = 0
    config.data.spans = settings(Spans())
    config.model.update(
        encoder_layers=4,
        decoder_layers=2,
        width=128,
        num_heads=4,
        head_dim=32,
        mlp_dim=512,
        activation="relu",
        scale_embedding=False,
        scale_head=True,
        scan_layers=False,
    )
    switch = common.router("switch", capacity_factor=1.25, eval_capacity_factor=2.0)
    for stack in (config.model.encoder_moe, config.model.decoder_moe):
        stack.every = 0 if variant == "dense" else 2
        stack.update(num_experts=8, expert_dim=512, group_size=512, transport="gather")
        stack.router = switch
    if variant == "expert_choice":
        config.model.encoder_moe.router = common.router("expert_choice", capacity_factor=1.0)

    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.schedule.final = 0.02
    config.training.steps = 600
    config.training.checkpoint_every = 150
    return config
