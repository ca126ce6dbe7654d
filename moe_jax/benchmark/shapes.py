"""Named shapes of MoE layers, from the data file ``shapes.json``."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

from moe_jax.errors import ConfigError, nearest
from moe_jax.nn.feed_forward import Activation

_FILE = Path(__file__).with_name("shapes.json")


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of one MoE layer.

    Attributes:
        name: Name of the shape.
        tokens: Number ``T`` of tokens.
        width: Model width ``M``.
        hidden: Hidden width ``F`` of an expert.
        experts: Number ``E`` of experts.
        k: Number ``K`` of experts per token.
        activation: Activation of the experts.
        gated: True for experts with three matrices, False for two.
    """

    name: str
    tokens: int
    width: int
    hidden: int
    experts: int
    k: int
    activation: Activation = "silu"
    gated: bool = True

    def flops(self, backward: bool) -> float:
        """Returns the useful FLOPs of the experts: neither router, nor empty slots, nor recompute.

        The forward pass has ``2 T K M F`` FLOPs per matrix, and the backward pass twice as many.
        """
        matrices = 3 if self.gated else 2
        forward = 2.0 * matrices * self.tokens * self.k * self.width * self.hidden
        return 3 * forward if backward else forward


@functools.cache
def shapes() -> dict[str, Shape]:
    """Returns all shapes by name."""
    return {name: Shape(name, **values) for name, values in json.loads(_FILE.read_text()).items()}


def shape(name: str) -> Shape:
    """Returns the shape called ``name``.

    Raises:
        ConfigError: If there is none.
    """
    if name not in shapes():
        raise ConfigError(f"--shapes: no shape is called {name!r}{nearest(name, shapes())}")
    return shapes()[name]
