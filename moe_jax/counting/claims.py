"""Published numbers of a model, beside the counted ones."""

from __future__ import annotations

import dataclasses
from typing import Any

from moe_jax.counting.count import PARTS, count
from moe_jax.models.config import Tokens


@dataclasses.dataclass(frozen=True)
class PublishedNumber:
    """One published number.

    Attributes:
        quantity: Path of the number in ``record``, with dots between keys.
        value: Printed number.
        within: Relative deviation that rounding and conventions explain.
        source: Publication that prints the number.
        wrong: Reason why the count does not reproduce the number; "" if it does.
    """

    quantity: str
    value: float
    within: float
    source: str
    wrong: str = ""

    def counted(self, record: dict[str, Any]) -> float:
        """Returns the counted number from a ``record``."""
        value: Any = record
        for key in self.quantity.split("."):
            value = value[key]
        return value

    def deviation(self, record: dict[str, Any]) -> float:
        """Returns the counted number minus the printed one, relative to the printed one."""
        return self.counted(record) / self.value - 1


def record(model: Any, vocab_size: int, tokens: Tokens) -> dict[str, Any]:
    """Returns all counts of a model as plain data.

    Args:
        model: Configuration of the model.
        vocab_size: ``V``.
        tokens: Length of the sequence.
    """
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
