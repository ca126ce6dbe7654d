"""Selections: the experts that each token chooses, or the tokens that each expert chooses."""

from moe_jax.routing.select.assigned import Balanced, Forced, Hash, Random
from moe_jax.routing.select.base import ExpertChoice, Select, Selection, SoftChoice, TokenChoice
from moe_jax.routing.select.bias import Bias, ComputeBias, PIBias, QuantileBias
from moe_jax.routing.select.by_token import ByToken
from moe_jax.routing.select.experts_choose import Cap, SoftSlots, TopTokens
from moe_jax.routing.select.rank import Limit, Rank, Sampled, Sinkhorn
from moe_jax.routing.select.rounded import RoundedTopK
from moe_jax.routing.select.sparse_mixer import SparseMixer
from moe_jax.routing.select.threshold import Active, Threshold
from moe_jax.routing.select.tokens_choose import Everyone, Top2, TopGroups, TopK, TopP

__all__ = [
    "Active",
    "Balanced",
    "Bias",
    "ByToken",
    "Cap",
    "ComputeBias",
    "Everyone",
    "ExpertChoice",
    "Forced",
    "Hash",
    "Limit",
    "PIBias",
    "QuantileBias",
    "Random",
    "Rank",
    "RoundedTopK",
    "Sampled",
    "Select",
    "Selection",
    "Sinkhorn",
    "SoftChoice",
    "SoftSlots",
    "SparseMixer",
    "Threshold",
    "TokenChoice",
    "Top2",
    "TopGroups",
    "TopK",
    "TopP",
    "TopTokens",
]
