"""How one tensor of ``transformers`` and parameters of ours are the same numbers.

A parameter is named as if no layer were scanned: ``layers.3.attention.query``; an index after a
bar picks a part of it: ``layers.3.feed_forward.experts.up|5`` is expert 5.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

Array = np.ndarray
Shapes = Sequence[tuple[int, ...]]


class Layout(Protocol):
    """One tensor of theirs as several of ours, and back."""

    def to_ours(self, tensor: Array, shapes: Shapes) -> list[Array]:
        """Returns our arrays, which have ``shapes``."""

    def to_theirs(self, arrays: Sequence[Array]) -> Array:
        """Returns their tensor."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor.

    Attributes:
        theirs: its name.
        ours: the parameters that it holds.
        layout: how.
    """

    theirs: str
    ours: tuple[str, ...]
    layout: Layout


@dataclasses.dataclass(frozen=True)
class Same:
    """The same numbers in the same order; ``shape`` is theirs, if it is not ours flattened."""

    shape: tuple[int, ...] = (-1,)

    def to_ours(self, tensor: Array, shapes: Shapes) -> list[Array]:
        """Reshapes."""
        return [tensor.reshape(shapes[0])]

    def to_theirs(self, arrays: Sequence[Array]) -> Array:
        """Reshapes."""
        return arrays[0].reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class Matrix:
    """``(outputs, inputs)`` of theirs, of which the first axes of ours are the ``inputs``."""

    inputs: int = 1

    def to_ours(self, tensor: Array, shapes: Shapes) -> list[Array]:
        """Transposes."""
        return [tensor.T.reshape(shapes[0])]

    def to_theirs(self, arrays: Sequence[Array]) -> Array:
        """Transposes."""
        rows = math.prod(arrays[0].shape[: self.inputs])
        return arrays[0].reshape(rows, -1).T


@dataclasses.dataclass(frozen=True)
class Rows:
    """Several matrices of one input, their outputs one after the other."""

    def to_ours(self, tensor: Array, shapes: Shapes) -> list[Array]:
        """Splits and transposes."""
        sizes = np.cumsum([math.prod(shape[1:]) for shape in shapes])[:-1]
        parts = np.split(tensor, sizes, axis=0)
        return [
            Matrix().to_ours(part, [shape])[0] for part, shape in zip(parts, shapes, strict=True)
        ]

    def to_theirs(self, arrays: Sequence[Array]) -> Array:
        """Transposes and joins."""
        return np.concatenate([Matrix().to_theirs([array]) for array in arrays], axis=0)


@dataclasses.dataclass(frozen=True)
class HeadRows:
    """Several matrices of one input, their outputs one after the other within each head."""

    def to_ours(self, tensor: Array, shapes: Shapes) -> list[Array]:
        """Splits each head; ours are ``(R, H, D)``."""
        heads, sizes = shapes[0][1], np.cumsum([shape[2] for shape in shapes])[:-1]
        parts = np.split(tensor.reshape(heads, -1, tensor.shape[-1]), sizes, axis=1)
        return [part.transpose(2, 0, 1) for part in parts]

    def to_theirs(self, arrays: Sequence[Array]) -> Array:
        """Joins each head."""
        joined = np.concatenate([array.transpose(1, 2, 0) for array in arrays], axis=1)
        return joined.reshape(-1, joined.shape[-1])


@dataclasses.dataclass(frozen=True)
class Columns:
    """Two arrays joined along the last axis: one after the other, or in turns."""

    in_turns: bool = False

    def to_ours(self, tensor: Array, shapes: Shapes) -> list[Array]:
        """Splits."""
        if self.in_turns:
            parts = [tensor[..., 0::2], tensor[..., 1::2]]
        else:
            parts = np.split(tensor, 2, axis=-1)
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def to_theirs(self, arrays: Sequence[Array]) -> Array:
        """Joins."""
        if self.in_turns:
            joined = np.stack(arrays, axis=-1)
            return joined.reshape(*joined.shape[:-2], -1)
        return np.concatenate(arrays, axis=-1)


@dataclasses.dataclass(frozen=True)
class Without:
    """A layout whose tensor has no axis of length 1 that ours has before the last (biases)."""

    inner: Layout = Same()

    def to_ours(self, tensor: Array, shapes: Shapes) -> list[Array]:
        """Adds the axis."""
        flat = [(*shape[:-2], shape[-1]) for shape in shapes]
        arrays = self.inner.to_ours(tensor, flat)
        return [array.reshape(shape) for array, shape in zip(arrays, shapes, strict=True)]

    def to_theirs(self, arrays: Sequence[Array]) -> Array:
        """Removes the axis."""
        return self.inner.to_theirs([array[..., 0, :] for array in arrays])


@dataclasses.dataclass(frozen=True)
class ExpertRows:
    """``(E * F, M)`` of theirs; ours is ``(E, F, M)``, or ``(E, M, F)`` if ``transposed``."""

    transposed: bool = False

    def to_ours(self, tensor: Array, shapes: Shapes) -> list[Array]:
        """Splits the experts."""
        experts = tensor.reshape(shapes[0][0], -1, tensor.shape[-1])
        return [experts.swapaxes(1, 2) if self.transposed else experts]

    def to_theirs(self, arrays: Sequence[Array]) -> Array:
        """Joins the experts."""
        experts = arrays[0].swapaxes(1, 2) if self.transposed else arrays[0]
        return experts.reshape(-1, experts.shape[-1])


@dataclasses.dataclass(frozen=True)
class ExpertMatrices:
    """``(E, outputs, inputs)`` of theirs, several of ours one after the other in the outputs."""

    def to_ours(self, tensor: Array, shapes: Shapes) -> list[Array]:
        """Splits and transposes; ours are ``(E, inputs, outputs)``."""
        sizes = np.cumsum([shape[-1] for shape in shapes])[:-1]
        return [part.swapaxes(1, 2) for part in np.split(tensor, sizes, axis=1)]

    def to_theirs(self, arrays: Sequence[Array]) -> Array:
        """Transposes and joins."""
        return np.concatenate([array.swapaxes(1, 2) for array in arrays], axis=1)


@dataclasses.dataclass(frozen=True)
class Whole:
    """The same array, axes and all."""

    def to_ours(self, tensor: Array, shapes: Shapes) -> list[Array]:
        """Returns it."""
        del shapes
        return [tensor]

    def to_theirs(self, arrays: Sequence[Array]) -> Array:
        """Returns it."""
        return arrays[0]
