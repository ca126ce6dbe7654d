"""Weights that are stored in eight or four bits with scales, read as float32.

DeepSeek-V3 (2412.19437, section 3.3): float8 with one float32 scale per tile of 128 x 128.
gpt-oss: MXFP4 (OCP Microscaling specification 1.0), two numbers in a byte and one power of two for
32 of them.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray

FP8_SCALE = "_scale_inv"
MXFP4 = ("_blocks", "_scales")
# Sign, two bits of exponent, one of mantissa.
_FP4 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_FP4 = np.concatenate([_FP4, -_FP4])
_EXPONENT_BIAS = 127


def from_fp8(weight: Array, scale: Array, tile: tuple[int, int] = (128, 128)) -> Array:
    """Returns ``weight (R, C)`` times the scale of its tile.

    Args:
        weight: ``(R, C)`` float8.
        scale: ``(ceil(R / tile), ceil(C / tile))`` float32.
        tile: rows and columns of a tile.

    Raises:
        ValueError: if there is not one scale per tile.
    """
    rows, columns = weight.shape
    expected = (-(-rows // tile[0]), -(-columns // tile[1]))
    if scale.shape != expected:
        raise ValueError(
            f"a weight {weight.shape} in tiles of {tile[0]} x {tile[1]} needs scales {expected}, "
            f"found {scale.shape}"
        )
    wide = np.repeat(scale.astype(np.float32), tile[0], axis=0)[:rows]
    wide = np.repeat(wide, tile[1], axis=1)[:, :columns]
    return weight.astype(np.float32) * wide


def from_mxfp4(blocks: Array, scales: Array) -> Array:
    """Returns the weights ``(E, inputs, outputs)`` of experts.

    Args:
        blocks: ``(E, outputs, inputs / 32, 16)`` uint8; the lower four bits come first.
        scales: ``(E, outputs, inputs / 32)`` uint8, exponents of two above -127.
    """
    pairs = np.stack([_FP4[blocks & 0xF], _FP4[blocks >> 4]], axis=-1)
    numbers = pairs.reshape(*scales.shape, -1)
    numbers = np.ldexp(numbers, scales.astype(np.int32)[..., None] - _EXPONENT_BIAS)
    return numbers.reshape(*scales.shape[:2], -1).swapaxes(1, 2)
