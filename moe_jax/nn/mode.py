"""The mode of a forward pass: an argument of every module."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class Mode:
    """Settings of one forward pass.

    Attributes:
        capacity: Capacity of the experts: the factor of training (``train``), the factor of
            evaluation (``eval``), or as many slots as tokens (``full``). With full capacity no
            token is dropped, and a row never depends on the other rows of its batch. Experts that
            choose tokens choose among each row by itself, with the factor of evaluation.
        record: True returns the experts of every token in the report of each layer.
        settings: Values of settings at this step of the training, by name, each a scalar array.
            They replace the settings of the routers and the weights of their losses; see
            ``moe_jax.routing.changeable``. ``None`` leaves all settings as they are.
        shares: True returns the share of every expert in the scores of every token in the report
            of each layer.
        padding_slots: False gives each group the slots of a group of its valid tokens, so that the
            drops of short texts do not depend on the padding around them. True counts padding, as
            the papers' layers of fixed shape do.
    """

    capacity: Literal["train", "eval", "full"] = "eval"
    record: bool = False
    settings: Mapping[str, Array] | None = None
    shares: bool = False
    padding_slots: bool = True


TRAIN = Mode("train")
EVAL = Mode("eval")
DECODE = Mode("full")
