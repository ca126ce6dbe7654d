"""The mode of a forward pass: a static argument of every module."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Mode:
    """Settings of one forward pass.

    Attributes:
        capacity: Capacity of the experts: the factor of training (``train``), the factor of
            evaluation (``eval``), or as many slots as tokens (``full``). With full capacity no
            token is dropped, and a sequence never depends on the other sequences of its batch.
        record: True returns the experts of every token in the report of each layer.
    """

    capacity: Literal["train", "eval", "full"] = "eval"
    record: bool = False


TRAIN = Mode("train")
EVAL = Mode("eval")
DECODE = Mode("full")
