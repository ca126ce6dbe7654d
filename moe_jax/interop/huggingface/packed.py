"""Unpacks weights that are stored in eight or four bits with scales to float32.

DeepSeek-V3 (2412.19437, section 3.3) stores float8 with one float32 scale per tile of 128 x 128;
Mistral Small 4 stores float8 with one scale per matrix, beside a scale of the activations.
gpt-oss stores MXFP4 (OCP Microscaling specification 1.0): a byte holds two numbers, and 32 numbers
share a power of two as their scale.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray

FP8_SCALE, ACTIVATION_SCALE = "_scale_inv", "activation_scale"
MXFP4 = ("_blocks", "_scales")
# A number has a sign bit, two bits of exponent and one bit of mantissa.
_MAGNITUDES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_FP4 = np.concatenate([_MAGNITUDES, -_MAGNITUDES])
_EXPONENT_BIAS = 127


def from_fp8(weight: Array, scale: Array, tile: tuple[int, int] = (128, 128)) -> Array:
    """Returns weights ``(..., R, C)`` in float32, each multiplied by its scale.

    Args:
        weight: The packed weights ``(..., R, C)``, float8.
        scale: The scale of each tile, ``(..., ceil(R / tile[0]), ceil(C / tile[1]))``, or of each
            matrix, ``(...)`` or ``(..., 1, 1)``, or one scale of all weights.
        tile: Rows and columns of a tile.

    Raises:
        ValueError: If the number of scales is none of these.
    """
    *stack, rows, columns = weight.shape
    grid = (*stack, -(-rows // tile[0]), -(-columns // tile[1]))
    scale = scale.astype(np.float32)
    if scale.shape == grid:
        wide = np.repeat(scale, tile[0], axis=-2)[..., :rows, :]
        wide = np.repeat(wide, tile[1], axis=-1)[..., :columns]
    elif scale.size == 1 or scale.shape in ((*stack,), (*stack, 1, 1)):
        wide = scale.reshape((*stack, 1, 1) if scale.size > 1 else ())
    else:
        raise ValueError(
            f"a weight {weight.shape} in tiles of {tile[0]} x {tile[1]} needs scales {grid}, or "
            f"one for each matrix, found {scale.shape}"
        )
    return weight.astype(np.float32) * wide


def from_mxfp4(blocks: Array, scales: Array) -> Array:
    """Returns the weights ``(E, inputs, outputs)`` of experts in float32.

    Args:
        blocks: Pairs of numbers, ``(E, outputs, inputs / 32, 16)`` uint8; the lower four bits are
            the first number.
        scales: Exponents of two plus 127, ``(E, outputs, inputs / 32)`` uint8.
    """
    pairs = np.stack([_FP4[blocks & 0xF], _FP4[blocks >> 4]], axis=-1)
    numbers = pairs.reshape(*scales.shape, -1)
    numbers = np.ldexp(numbers, scales.astype(np.int32)[..., None] - _EXPONENT_BIAS)
    return numbers.reshape(*scales.shape[:2], -1).swapaxes(1, 2)
