"""A model like Nemotron 3 Super (2604.12374): its 40 LatentMoE layers, beside attention.

This is not the published model, whose other layers are 40 of Mamba-2 and 8 of attention; here each
MoE layer follows a layer of attention, and there is no module that looks ahead. The experts work in
a latent space of a quarter of the width; router and shared expert read the full width. The sizes
are those of NVIDIA-Nemotron-3-Super-120B-A12B, as the tests of NemotronHBridge in Megatron-Bridge
state them.
"""

from ml_collections import ConfigDict
from moe_jax.configs.families import nemotron_3


def get_config() -> ConfigDict:
    config = nemotron_3.like("nemotron_3_super_like", layers=40, width=4096)
    config.model.moe.update(every=1, num_experts=512, expert_dim=2688, latent_dim=1024)
    config.model.moe.shared.hidden = 5376
    config.model.moe.router = nemotron_3.router(k=22, scale=5.0)
    return config
