"""A masked language model at a size that trains in seconds; experts choose tokens."""

from moe_jax.configs import masked_language


def get_config(variant: str = "expert_choice"):
    config = masked_language.get_config(variant)
    config.name = f"tiny-masked-{variant}"
    config.data.update(tokenizer="bytes", seq_length=32, shuffle_window=16)
    config.model.update(num_layers=2, width=16, num_heads=2, head_dim=8, mlp_dim=32)
    config.model.moe.update(num_experts=4, expert_dim=32, group_size=64)
    config.optimizer.warmup_steps = 5
    config.training.update(steps=30, log_every=1, checkpoint_every=10)
    return config
