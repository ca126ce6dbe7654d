"""A small language model on the Python standard library, trained in minutes on two CPU cores.

``--config=quickstart:NAME`` selects a variant: ``switch`` (default), ``dense`` (no experts),
``gshard`` (two experts of half the width per token) or ``expert_choice`` (experts choose tokens).
Expert choice leaks later tokens in a causal model, so its loss is not comparable. All variants have
the same FLOPs per token.
"""

from ml_collections import ConfigDict
from moe_jax.configs import common


def get_config(variant: str = "switch") -> ConfigDict:
    config = common.base(f"quickstart-{variant}")
    config.data.vocab_size = 2048
    config.data.seq_length = 256
    config.data.batch_size = 8
    # A run is shorter than an epoch; with 0 it draws rows from the whole library at every step.
    config.data.shuffle_window = 0

    model = config.model
    model.num_layers = 4
    model.width = 128
    model.num_heads = 4
    model.head_dim = 32
    model.mlp_dim = 512
    model.activation = "relu"
    model.scan_layers = False

    model.moe.every = 2
    model.moe.num_experts = 8
    model.moe.expert_dim = 512
    model.moe.group_size = 512
    model.moe.transport = "gather"
    model.moe.router = common.router("switch", capacity_factor=1.25, eval_capacity_factor=2.0)

    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.schedule.final = 0.02

    config.training.steps = 600
    config.training.log_every = 5
    config.training.loss_chunk = 32
    config.training.checkpoint_every = 150

    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; known: {', '.join(VARIANTS)}")
    VARIANTS[variant](config)
    return config


def _switch(config: ConfigDict) -> None:
    del config


def _dense(config: ConfigDict) -> None:
    config.model.moe.every = 0


def _gshard(config: ConfigDict) -> None:
    config.model.moe.num_experts = 16
    config.model.moe.expert_dim = 256
    config.model.moe.router = common.router("gshard", capacity_factor=2.5, eval_capacity_factor=4.0)


def _expert_choice(config: ConfigDict) -> None:
    config.model.moe.allow_future_leak = True
    config.model.moe.router = common.router(
        "expert_choice", capacity_factor=1.0, eval_capacity_factor=1.0
    )


VARIANTS = {
    "switch": _switch,
    "dense": _dense,
    "gshard": _gshard,
    "expert_choice": _expert_choice,
}
