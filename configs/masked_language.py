"""A masked language model with Switch layers on the Python standard library.

A mask replaces 15 % of the tokens, and an encoder, which reads in both directions, predicts them
(Devlin et al. 2019). No token leaks, so experts may choose tokens.
``--config=masked_language:NAME`` selects a variant: ``switch`` (default), ``dense`` (no experts),
``gshard`` or ``expert_choice``. All have the same FLOPs per token.
"""

from ml_collections import ConfigDict
from moe_jax.configs import common, quickstart


def get_config(variant: str = "switch") -> ConfigDict:
    config = quickstart.get_config(variant)
    config.name = f"masked-language-{variant}"
    config.model.causal = False
    config.model.moe.allow_future_leak = False
    config.data.mask_rate = 0.15
    if variant == "expert_choice":
        config.model.moe.router = common.router("expert_choice", capacity_factor=1.0)
    return config
