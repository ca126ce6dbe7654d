"""A small language model on the Python standard library, trained in minutes on two CPU cores.

Variants, chosen as ``--config=configs/quickstart.py:NAME``: ``switch`` (default), ``dense`` (no
experts), ``gshard`` (two experts of half the width per token) and ``expert_choice`` (experts choose
tokens; leaks the future in a causal model, so for looking at routing, not at the loss). All spend
the same FLOPs per token.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "switch") -> ConfigDict:
    config = ConfigDict()
    config.name = f"quickstart-{variant}"
    config.data = ConfigDict(
        dict(
            source="python_library",
            tokenizer="sentencepiece",
            vocab_size=2048,
            seq_length=256,
            batch_size=16,
            seed=0,
        )
    )
    config.model = ConfigDict(
        dict(
            num_layers=4,
            width=128,
            num_heads=4,
            head_dim=32,
            mlp_dim=512,
            activation="relu",
            gated=False,
            positions="rotary",
            tie_embeddings=True,
            dropout=0.0,
            init_scale=1.0,
            scan_layers=False,
            remat="none",
            compute_dtype="float32",
        )
    )
    config.model.moe = ConfigDict(
        dict(
            every=2,
            num_experts=8,
            expert_dim=512,
            group_size=512,
            transport="gather",
            expert_dropout=0.0,
            allow_future_leak=False,
        )
    )
    config.model.moe.router = ConfigDict(
        dict(preset="switch", capacity_factor=1.25, eval_capacity_factor=2.0)
    )
    config.optimizer = ConfigDict(
        dict(learning_rate=3e-3, warmup_steps=50, clip_norm=1.0)
    )
    config.optimizer.update = ConfigDict(dict(type="AdamW", b2=0.95, weight_decay=0.1))
    config.optimizer.schedule = ConfigDict(dict(type="Cosine", final=0.02))
    config.training = ConfigDict(
        dict(
            steps=600,
            seed=0,
            microbatches=1,
            loss_chunk=32,
            z_loss=0.0,
            log_every=10,
            eval_every=0,
            checkpoint_every=200,
        )
    )
    config.mesh = ConfigDict(dict(data=-1, expert=1, model=1))
    VARIANTS[variant](config)
    return config


def _switch(config: ConfigDict) -> None:
    del config


def _dense(config: ConfigDict) -> None:
    config.model.moe.every = 0


def _gshard(config: ConfigDict) -> None:
    config.model.moe.num_experts = 16
    config.model.moe.expert_dim = 256
    config.model.moe.router = ConfigDict(
        dict(preset="gshard", capacity_factor=2.5, eval_capacity_factor=4.0)
    )


def _expert_choice(config: ConfigDict) -> None:
    config.model.moe.allow_future_leak = True
    config.model.moe.router = ConfigDict(
        dict(preset="expert_choice", capacity_factor=1.0, eval_capacity_factor=1.0)
    )


VARIANTS = {
    "switch": _switch,
    "dense": _dense,
    "gshard": _gshard,
    "expert_choice": _expert_choice,
}
