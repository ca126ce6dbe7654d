"""GLaM (Du et al. 2021, 2112.06905) and the models of Expert Choice (Zhou et al. 2022, 2202.09368).

Dense layers are gated, experts are not, and embedding and output projection are tied. In GLaM each
layer has its own relative positions; here all layers share one table, a difference too small to
change a printed count. The printed active parameters of the largest model imply a vocabulary of
256k, and of all other models a vocabulary of 32k.
"""

from ml_collections import ConfigDict
from moe_jax.configs import common

SIZES = {
    "0.1b": {"num_layers": 12, "width": 768, "mlp_dim": 3072, "num_heads": 12, "head_dim": 64},
    "1.7b": {"num_layers": 24, "width": 2048, "mlp_dim": 8192, "num_heads": 16, "head_dim": 128},
    "8b": {"num_layers": 32, "width": 4096, "mlp_dim": 16384, "num_heads": 32, "head_dim": 128},
    "137b": {"num_layers": 64, "width": 8192, "mlp_dim": 65536, "num_heads": 128, "head_dim": 128},
    "64b": {"num_layers": 64, "width": 8192, "mlp_dim": 32768, "num_heads": 128, "head_dim": 128},
}


def glam(name: str, size: str, experts: int = 0, vocab_size: int = 32_000) -> ConfigDict:
    """Returns a model with ``experts`` in every other layer, or a dense model for 0."""
    config = common.base(name)
    config.model.update(SIZES[size])
    config.model.update(gated=True, compute_dtype="bfloat16", remat="full")
    config.model.positions = common.part("T5Relative")
    moe = config.model.moe
    moe.every = 2 if experts else 0
    moe.update(num_experts=experts or 8, expert_dim=config.model.mlp_dim, gated=False)
    moe.router = common.router("glam")
    config.data.update(source="c4/en", vocab_size=vocab_size, seq_length=1024, batch_size=1024)
    common.adafactor(config, learning_rate=1.0)
    return config


def expert_choice(name: str, size: str, experts: int) -> ConfigDict:
    """Returns the same model with expert choice, which leaks later tokens, as the paper says."""
    config = glam(name, size, experts)
    config.model.moe.allow_future_leak = True
    config.model.moe.router = common.router("expert_choice", capacity_factor=2.0)
    return config
