"""T5's span corruption with a Switch encoder-decoder on the Python standard library.

Spans of three tokens on average, 15 % of each text, are cut out, and the decoder predicts them
(Raffel et al. 2020, Fedus et al. 2021). ``--config=span_corruption:NAME`` selects a variant:
``switch`` (default), ``dense`` (no experts) or ``expert_choice`` (experts choose tokens in the
encoder, where nothing leaks; the decoder keeps Switch). All have the same FLOPs per token.
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
    # 256 inputs have at most 58 targets; with 64 target tokens per row, groups are whole.
    config.data.update(vocab_size=2048, seq_length=256, target_length=64, batch_size=8)
    # A run is shorter than an epoch; with 0 it draws rows from the whole library at every step.
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
