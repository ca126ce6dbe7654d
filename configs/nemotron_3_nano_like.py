"""A model like Nemotron 3 Nano (2512.20848): its 23 MoE layers, beside attention.

This is not the published model, whose other layers are 23 of Mamba-2 and 6 of attention; here each
MoE layer follows a layer of attention. Experts have squared ReLU, no gate and no latent space. The
sizes are those of Nemotron3NanoProvider in Megatron-Bridge.
"""

from ml_collections import ConfigDict
from moe_jax.configs.families import nemotron_3


def get_config() -> ConfigDict:
    config = nemotron_3.like("nemotron_3_nano_like", layers=23, width=2688)
    config.model.moe.update(every=1, num_experts=128, expert_dim=1856)
    config.model.moe.shared.hidden = 3712
    config.model.moe.router = nemotron_3.router(k=6, scale=2.5)
    return config
