"""The quickstart at a size that trains in seconds, with everything random in it switched on."""

from moe_jax.configs import quickstart


def get_config(variant: str = "switch"):
    config = quickstart.get_config(variant)
    config.name = f"tiny-{variant}"
    config.data.update(tokenizer="bytes", seq_length=32, batch_size=8, shuffle_window=16)
    config.model.update(num_layers=2, width=16, num_heads=2, head_dim=8, mlp_dim=32, dropout=0.1)
    config.model.moe.update(num_experts=4, expert_dim=32, group_size=32)
    config.optimizer.warmup_steps = 5
    config.training.update(steps=40, loss_chunk=0, log_every=1, eval_every=20, checkpoint_every=10)
    return config
