"""What is published of a model, beside what is counted."""

from __future__ import annotations

import dataclasses
from typing import Any

from moe_jax.counting.count import PARTS, count
from moe_jax.models.config import Tokens


@dataclasses.dataclass(frozen=True)
class Claim:
    """One published number.

    Attributes:
        quantity: its name in ``record``, with dots.
        value: as printed.
        within: the relative deviation that rounding and convention explain.
        source: where it is printed.
        wrong: why it cannot be reproduced; "" where it is.
    """

    quantity: str
    value: float
    within: float
    source: str
    wrong: str = ""

    def counted(self, found: dict[str, Any]) -> float:
        """Returns the same quantity of a ``record``."""
        for key in self.quantity.split("."):
            found = found[key]
        return found

    def deviation(self, found: dict[str, Any]) -> float:
        """Returns how far the count is above the printed number, relative to it."""
        return self.counted(found) / self.value - 1


def record(model: Any, vocab_size: int, tokens: Tokens) -> dict[str, Any]:
    """Returns everything that is counted of a model, as plain data."""
    cost = count(model, vocab_size, tokens)
    others = {kind: count(model, vocab_size, tokens, kind) for kind in ("kaplan", "full")}
    sequence = {"exact": cost, **others}
    return {
        "total": cost.total,
        "lookahead": cost.lookahead,
        "experts": cost.experts,
        "active": cost.active_by_convention,
        "parameters": cost.parameters,
        "flops_per_token": {
            "forward": cost.flops_per_token,
            "training": cost.training_flops_per_token,
            "by_part": {part: cost.flops_by_part[part] for part in PARTS},
        },
        "flops_per_sequence": {kind: each.flops_per_sequence for kind, each in sequence.items()},
        "training_flops_per_sequence": {
            kind: 3 * each.flops_per_sequence for kind, each in sequence.items()
        },
        "tokens": dataclasses.asdict(tokens),
    }
