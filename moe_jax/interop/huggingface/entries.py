"""Maps one tensor of ``transformers`` to parameters of this package, and back.

The name of a parameter does not depend on scanning: ``layers.3.attention.query``. An index after a
bar selects an entry of its first axis: ``layers.3.feed_forward.experts.up|5`` is expert 5.
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
    """A mapping between one tensor of ``transformers`` and one or more of our parameters."""

    def to_ours(self, tensor: Array, shapes: Shapes) -> list[Array]:
        """Returns our parameters, one for each of ``shapes``."""

    def to_theirs(self, arrays: Sequence[Array]) -> Array:
        """Returns the tensor of ``transformers``."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of ``transformers`` and the parameters that it holds.

    Attributes:
        theirs: Name of the tensor.
        ours: Names of the parameters.
        layout: Mapping between the tensor and the parameters.
    """

    theirs: str
    ours: tuple[str, ...]
    layout: Layout


@dataclasses.dataclass(frozen=True)
class Same:
    """The tensor and the parameter hold the same numbers in the same order.

    Attributes:
        shape: Shape of the tensor. The default is the flattened parameter.
    """

    shape: tuple[int, ...] = (-1,)

    def to_ours(self, tensor: Array, shapes: Shapes) -> list[Array]:
        """Reshapes the tensor."""
        return [tensor.reshape(shapes[0])]

    def to_theirs(self, arrays: Sequence[Array]) -> Array:
        """Reshapes the parameter."""
        return arrays[0].reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class Matrix:
    """The tensor is the matrix ``(outputs, inputs)``; the parameter has its inputs first.

    Attributes:
        inputs: Number of axes of the parameter that are inputs.
    """

    inputs: int = 1

    def to_ours(self, tensor: Array, shapes: Shapes) -> list[Array]:
        """Transposes the tensor."""
        return [tensor.T.reshape(shapes[0])]

    def to_theirs(self, arrays: Sequence[Array]) -> Array:
        """Transposes the parameter."""
        rows = math.prod(arrays[0].shape[: self.inputs])
        return arrays[0].reshape(rows, -1).T


@dataclasses.dataclass(frozen=True)
class RowRange:
    """The tensor concatenates the outputs of several matrices of one input."""

    def to_ours(self, tensor: Array, shapes: Shapes) -> list[Array]:
        """Splits the tensor and transposes the parts."""
        sizes = np.cumsum([math.prod(shape[1:]) for shape in shapes])[:-1]
        parts = np.split(tensor, sizes, axis=0)
        return [
            Matrix().to_ours(part, [shape])[0] for part, shape in zip(parts, shapes, strict=True)
        ]

    def to_theirs(self, arrays: Sequence[Array]) -> Array:
        """Transposes the parameters and concatenates them."""
        return np.concatenate([Matrix().to_theirs([array]) for array in arrays], axis=0)


@dataclasses.dataclass(frozen=True)
class HeadRows:
    """The tensor concatenates the outputs of several matrices of one input within each head."""

    def to_ours(self, tensor: Array, shapes: Shapes) -> list[Array]:
        """Splits each head; the parameters have shape ``(R, H, D)``."""
        heads, sizes = shapes[0][1], np.cumsum([shape[2] for shape in shapes])[:-1]
        parts = np.split(tensor.reshape(heads, -1, tensor.shape[-1]), sizes, axis=1)
        return [part.transpose(2, 0, 1) for part in parts]

    def to_theirs(self, arrays: Sequence[Array]) -> Array:
        """Concatenates the parameters within each head."""
        joined = np.concatenate([array.transpose(1, 2, 0) for array in arrays], axis=1)
        return joined.reshape(-1, joined.shape[-1])


@dataclasses.dataclass(frozen=True)
class Columns:
    """The tensor joins two parameters along the last axis.

    Attributes:
        in_turns: The columns of the two parameters alternate, instead of being concatenated.
    """

    in_turns: bool = False

    def to_ours(self, tensor: Array, shapes: Shapes) -> list[Array]:
        """Splits the columns."""
        if self.in_turns:
            parts = [tensor[..., 0::2], tensor[..., 1::2]]
        else:
            parts = list(np.split(tensor, 2, axis=-1))
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def to_theirs(self, arrays: Sequence[Array]) -> Array:
        """Joins the columns."""
        if self.in_turns:
            joined = np.stack(arrays, axis=-1)
            return joined.reshape(*joined.shape[:-2], -1)
        return np.concatenate(arrays, axis=-1)


@dataclasses.dataclass(frozen=True)
class Without:
    """The tensor lacks the axis of length 1 that a parameter has before its last axis (biases).

    Attributes:
        inner: Layout apart from this axis.
    """

    inner: Layout = Same()

    def to_ours(self, tensor: Array, shapes: Shapes) -> list[Array]:
        """Adds the axis to the parameters."""
        flat = [(*shape[:-2], shape[-1]) for shape in shapes]
        arrays = self.inner.to_ours(tensor, flat)
        return [array.reshape(shape) for array, shape in zip(arrays, shapes, strict=True)]

    def to_theirs(self, arrays: Sequence[Array]) -> Array:
        """Removes the axis from the parameters."""
        return self.inner.to_theirs([array[..., 0, :] for array in arrays])


@dataclasses.dataclass(frozen=True)
class ExpertRows:
    """The tensor ``(E * F, M)`` concatenates the rows of all experts.

    Attributes:
        transposed: The parameter is ``(E, M, F)`` instead of ``(E, F, M)``.
    """

    transposed: bool = False

    def to_ours(self, tensor: Array, shapes: Shapes) -> list[Array]:
        """Separates the experts."""
        experts = tensor.reshape(shapes[0][0], -1, tensor.shape[-1])
        return [experts.swapaxes(1, 2) if self.transposed else experts]

    def to_theirs(self, arrays: Sequence[Array]) -> Array:
        """Concatenates the experts."""
        experts = arrays[0].swapaxes(1, 2) if self.transposed else arrays[0]
        return experts.reshape(-1, experts.shape[-1])


@dataclasses.dataclass(frozen=True)
class ExpertMatrices:
    """The tensor ``(E, outputs, inputs)`` concatenates the outputs of several parameters."""

    def to_ours(self, tensor: Array, shapes: Shapes) -> list[Array]:
        """Splits the tensor into parameters ``(E, inputs, outputs)``."""
        sizes = np.cumsum([shape[-1] for shape in shapes])[:-1]
        return [part.swapaxes(1, 2) for part in np.split(tensor, sizes, axis=1)]

    def to_theirs(self, arrays: Sequence[Array]) -> Array:
        """Transposes the parameters and concatenates them."""
        return np.concatenate([array.swapaxes(1, 2) for array in arrays], axis=1)


@dataclasses.dataclass(frozen=True)
class EitherWay:
    """As ``ExpertMatrices``, or with the inputs before the outputs: the shape tells (Qwen3-VL)."""

    def to_ours(self, tensor: Array, shapes: Shapes) -> list[Array]:
        """Splits the tensor into parameters ``(E, inputs, outputs)``."""
        outputs = sum(shape[-1] for shape in shapes)
        if tensor.shape[1:] != (outputs, shapes[0][1]):
            tensor = tensor.swapaxes(1, 2)
        return ExpertMatrices().to_ours(tensor, shapes)

    def to_theirs(self, arrays: Sequence[Array]) -> Array:
        """Transposes the parameters and concatenates them."""
        return ExpertMatrices().to_theirs(arrays)


@dataclasses.dataclass(frozen=True)
class Whole:
    """The tensor and the parameter are the same array."""

    def to_ours(self, tensor: Array, shapes: Shapes) -> list[Array]:
        """Returns the tensor."""
        del shapes
        return [tensor]

    def to_theirs(self, arrays: Sequence[Array]) -> Array:
        """Returns the parameter."""
        return arrays[0]
