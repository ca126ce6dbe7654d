"""Span corruption at a size that trains in seconds, with dropout and a biased router."""

from moe_jax.configs import common, span_corruption


def get_config(variant: str = "expert_choice"):
    config = span_corruption.get_config(variant)
    config.name = f"tiny-spans-{variant}"
    config.data.update(tokenizer="bytes", seq_length=32, target_length=16, shuffle_window=16)
    config.model.update(
        encoder_layers=2,
        decoder_layers=2,
        width=16,
        num_heads=2,
        head_dim=8,
        mlp_dim=32,
        dropout=0.1,
    )
    for stack in (config.model.encoder_moe, config.model.decoder_moe):
        stack.update(num_experts=4, expert_dim=32, group_size=16)
    config.model.decoder_moe.router = common.router("loss_free", k=2)
    config.optimizer.warmup_steps = 5
    config.training.update(steps=30, log_every=1, eval_every=15, checkpoint_every=10)
    return config
