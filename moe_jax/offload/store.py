"""Places of experts that are not on the device: host memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Array, Shaped

from moe_jax.errors import ConfigError
from moe_jax.models import Decoder
from moe_jax.nn.feed_forward import Experts

ExpertId = tuple[int, int]  # (MoE layer in the order of the model, expert)
ExpertArrays = Mapping[str, Shaped[np.ndarray, "..."]]


class Store(Protocol):
    """Holds all experts of a model outside the device; several threads may read at once."""

    @property
    def experts(self) -> tuple[int, ...]:
        """Number of experts of each MoE layer."""

    def nbytes(self, expert: ExpertId) -> int:
        """Returns the number of bytes that an expert takes on the device."""

    def read(self, expert: ExpertId) -> ExpertArrays:
        """Returns the arrays of an expert by name.

        Raises:
            ConfigError: If the expert cannot be read; the message is one line.
        """


class HostStore:
    """Holds experts in host memory."""

    def __init__(self, layers: Sequence[Sequence[ExpertArrays]]):
        """Keeps the arrays of every expert of every MoE layer, such as from ``arrays_of``."""
        self._layers = layers

    @property
    def experts(self) -> tuple[int, ...]:
        """Number of experts of each MoE layer."""
        return tuple(len(layer) for layer in self._layers)

    def nbytes(self, expert: ExpertId) -> int:
        """Returns the number of bytes of the arrays of an expert."""
        return sum(array.nbytes for array in self.read(expert).values())

    def read(self, expert: ExpertId) -> ExpertArrays:
        """Returns the arrays of an expert by name."""
        layer, index = expert
        return self._layers[layer][index]


def arrays_of(model: Decoder, dtype: np.dtype | None = None) -> list[list[ExpertArrays]]:
    """Returns the parameters of all experts of a decoder in host memory.

    Args:
        model: Decoder; every MoE layer has feed-forward experts of one width.
        dtype: Type of the arrays, such as the one that the model computes in; ``None`` keeps the
            type of the parameters.

    Returns:
        For each MoE layer, in the order of the model, and each expert: matrices ``name (N, M)``
        with their outputs first, and biases ``name_bias (N,)``; names are ``up``, ``gate`` and
        ``down``.

    Raises:
        ConfigError: If the model has no experts, or experts of another kind.
    """

    def on_host(own: Mapping[str, Array]) -> ExpertArrays:
        return {name: np.asarray(array, dtype) for name, array in own.items()}

    found = [[on_host(own) for own in experts.separate()] for experts in experts_of(model)]
    if not found:
        raise ConfigError("the model has no experts to offload: upcycle it first (moe-jax upcycle)")
    return found


def experts_of(model: Decoder) -> Iterator[Experts]:
    """Yields the experts of each MoE layer in the order of the model.

    Raises:
        ConfigError: If a layer has experts of several widths, or experts that are no feed-forward
            networks.
    """
    for number, view in enumerate(model.layers.layers()):
        for name, mixture in view.block.mixtures.items():
            if not isinstance(mixture.experts, Experts):
                raise ConfigError(
                    f"layer {number} ({name}) has {type(mixture.experts).__name__} for experts: "
                    "offload models whose experts are feed-forward networks of one width"
                )
            yield view.take(mixture.experts)
