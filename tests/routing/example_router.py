"""A new router in one file: a selection and a preset. The decorator
``moe_jax.register_router`` above the preset is all that is left.

Everybody goes to the second best expert, which is nobody's idea of a good router.
"""

from __future__ import annotations

import dataclasses

from moe_jax.errors import ConfigError
from moe_jax.routing import Capacity, Inputs, LoadBalance, Router, Scored, Select, Softmax
from moe_jax.routing.select import TokenChoice
from moe_jax.routing.select.base import at, best, every_choice


@dataclasses.dataclass(frozen=True)
class SecondBest(Select):
    """Every token takes its second best expert, with the raw score as gate."""

    def choices(self, num_experts: int) -> int:
        """Returns ``K``."""
        del num_experts
        return 1

    def check(self, num_experts: int) -> None:
        """Raises ``ConfigError`` if there is no second expert."""
        if num_experts < 2:
            raise ConfigError(f"SecondBest needs 2 experts, but there are {num_experts}")

    def __call__(self, scored: Scored, inputs: Inputs) -> TokenChoice:
        """Selects on one group."""
        expert = best(scored.scores, 2)[:, 1:]
        return every_choice(expert, at(scored.scores, expert), inputs.valid)


def second_best(capacity_factor: float = 1.25, balance_weight: float = 1e-2) -> Router:
    """The second best expert of a softmax, with Switch's loss and capacity."""
    return Router(
        Softmax(),
        SecondBest(),
        (LoadBalance(balance_weight),),
        Capacity(capacity_factor, capacity_factor),
    )
