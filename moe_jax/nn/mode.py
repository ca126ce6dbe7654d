"""What a forward pass is for: a static argument of every module."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Mode:
    """How to run a forward pass.

    Attributes:
        capacity: ``train`` or ``eval`` capacity factor, or ``full``: as many slots as tokens, so
            that nothing is dropped and a sequence never depends on the others of its batch.
        record: return every token's experts in the layers' aux.
    """

    capacity: Literal["train", "eval", "full"] = "eval"
    record: bool = False


TRAIN = Mode("train")
EVAL = Mode("eval")
DECODE = Mode("full")
