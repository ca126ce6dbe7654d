"""A mixture-of-experts language model for corpora of web text, for one accelerator or more.

The model has 12 layers of width 768, each with 32 experts, of which a token chooses 4 (0.51 billion
parameters with a vocabulary of 32,768, 0.11 billion active per token). The configs differ in the
data alone.
"""

from ml_collections import ConfigDict
from moe_jax.configs import common


def web_text(name: str, source: str) -> ConfigDict:
    """Returns the model with the data ``source``, of which the field ``text`` is read."""
    config = common.base(name)
    config.data.update(
        source=source,
        text_feature="text",
        vocab_size=32_768,
        seq_length=2048,
        batch_size=128,
        streams=8,
        eval_documents=5000,
        # These corpora are larger than a file of tokens for 0 may be.
        shuffle_window=65_536,
    )
    model = config.model
    model.update(
        num_layers=12,
        width=768,
        num_heads=12,
        head_dim=64,
        mlp_dim=512,
        gated=True,
        activation="silu",
        compute_dtype="bfloat16",
        remat="full",
    )
    model.moe.update(every=1, num_experts=32, expert_dim=512)
    model.moe.router = common.router("olmoe", k=4)
    config.optimizer.learning_rate = 6e-4
    config.optimizer.warmup_steps = 2000
    config.training.update(
        steps=40_000, loss_chunk=256, z_loss=1e-4, eval_every=1000, checkpoint_every=1000
    )
    return config


def without_validation(config: ConfigDict, one_in: int) -> None:
    """Takes one document in ``one_in`` of the training split for validation."""
    config.data.eval_split = ""
    config.data.eval_one_in = one_in
