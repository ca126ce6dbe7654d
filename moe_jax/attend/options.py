"""The parts of an attention that its arrays and its view do not hold."""

from __future__ import annotations

import dataclasses
from typing import Literal

Kernel = Literal["auto", "blocks", "cudnn", "splash"]


@dataclasses.dataclass(frozen=True)
class Options:
    """Scale, window and chunk of an attention, and the implementation that a setting names.

    Attributes:
        scale: Factor of the scores.
        window: Number of tokens that a query attends to, its own token included; 0 means all.
        chunk: Number of positions per chunk, within which a query attends; 0 means no chunks.
        kernel: Name of an implementation; ``auto`` chooses by platform.
    """

    scale: float = 1.0
    window: int = 0
    chunk: int = 0
    kernel: Kernel = "auto"
