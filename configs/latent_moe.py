"""A small model with LatentMoE layers (2601.18089) on the Python standard library.

``--config=latent_moe:NAME`` selects a variant: ``latent`` (default), in which 32 experts of a
quarter of the model width take 8 choices of each token, or ``wide``, in which 8 experts of the full
width take 2. The experts of both have equal parameters and FLOPs; router, shared expert and squared
ReLU are those of Nemotron 3.
"""

from ml_collections import ConfigDict
from moe_jax.configs import quickstart
from moe_jax.configs.families import nemotron_3

# Number of experts, choices per token, and width of the latent space.
VARIANTS = {"latent": (32, 8, 32), "wide": (8, 2, 0)}


def get_config(variant: str = "latent") -> ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; known: {', '.join(VARIANTS)}")
    experts, k, latent = VARIANTS[variant]
    config = quickstart.get_config()
    config.name = f"latent-moe-{variant}"
    config.model.activation = "relu2"
    config.model.moe.update(num_experts=experts, expert_dim=256, latent_dim=latent)
    config.model.moe.shared.hidden = 256
    config.model.moe.transport = "auto"
    config.model.moe.router = nemotron_3.router(k=k, scale=2.5)
    return config
