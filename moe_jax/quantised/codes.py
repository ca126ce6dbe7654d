"""Codes and scales of the weights of experts, by the array quantisation of qwix.

Quantisation is symmetric: a weight is its code times the scale of its output channel, or of a group
of its input channels. Scales per input channel (AWQ, 2306.00978) make the codes of channels with
large activations finer.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from moe_jax.errors import ConfigError

Precision = Literal["int8", "int4", "fp8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
_TYPES = {"int8": jnp.int8, "int4": jnp.int4, "fp8": jnp.float8_e4m3fn}
_BITS = {"int8": 8, "int4": 4, "fp8": 8}
_NUMBER_BYTES = 4  # of a scale, and of the index of an expert


@dataclasses.dataclass(frozen=True)
class Codes:
    """The quantised weights of some experts; a weight is code times scale times factor.

    Attributes:
        values: Codes ``(E, I, O)`` of type int8, int4 or float8_e4m3fn.
        scales: Scales ``(E, G, O)`` float32; each group of ``I / G`` input channels shares one.
        factors: Factors ``(E, I)`` float32 of the input channels; ``None`` for factors of 1.
    """

    values: Shaped[Array, "E I O"] | np.ndarray
    scales: Float[Array, "E G O"] | np.ndarray
    factors: Float[Array, "E I"] | np.ndarray | None = None

    def weights(self) -> Float[np.ndarray, "E I O"]:
        """Returns the weights ``(E, I, O)`` float32 that the codes stand for."""
        values, scales = np.asarray(self.values), np.asarray(self.scales)
        repeated = np.repeat(scales, values.shape[1] // scales.shape[1], axis=1)
        found = values.astype(np.float32) * repeated
        return found if self.factors is None else found * np.asarray(self.factors)[..., None]


def quantise(
    weights: Float[Array, "E I O"],
    precision: Precision,
    group: int = 0,
    factors: Float[Array, "E I"] | None = None,
) -> Codes:
    """Returns the codes of the weights of experts.

    Scales are computed from the weights of one expert alone, so the codes do not depend on the
    sharding of experts. The error of an int8 or int4 weight is at most half its scale times its
    factor.

    Args:
        weights: Weights ``(E, I, O)`` of ``E`` linear maps from ``I`` to ``O`` channels.
        precision: ``int8``, ``int4`` or ``fp8`` (e4m3).
        group: Number of input channels that share a scale; 0 for all.
        factors: Factors of the input channels, such as from ``factors_of``.

    Raises:
        ConfigError: If qwix is not installed.
    """
    scaled = weights.astype(jnp.float32)
    if factors is not None:
        scaled = scaled / factors[..., None]
    found = _codes(scaled, precision, group)
    return Codes(found.qvalue, found.scale, factors)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _codes(weights: Array, precision: Precision, group: int) -> Any:
    channelwise, tiled = ((0, 2), {1: group}) if group else ((0, 2), {})
    return _qwix().quantize(
        weights, _TYPES[precision], channelwise_axes=channelwise, tiled_axes=tiled
    )


def factors_of(
    weights: Float[Array, "E I O"],
    activity: Float[Array, "E I"],
    precision: Precision,
    group: int = 0,
) -> Float[Array, "E I"]:
    """Returns the factors of input channels that lower the error of the outputs (AWQ, 2306.00978).

    The factors of an expert are a power from 0 to -1 of the channels' activity, with the least sum
    of squared errors of the weights times the activity. The factors of an expert without tokens
    are 1.

    Args:
        weights: Weights ``(E, I, O)``.
        activity: Mean magnitude ``(E, I)`` of the activation of each input channel.
        precision: As in ``quantise``.
        group: As in ``quantise``.

    Raises:
        ConfigError: If qwix is not installed.
    """
    return _factors(weights.astype(jnp.float32), activity, precision, group)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _factors(weights: Array, activity: Array, precision: Precision, group: int) -> Array:
    core = _qwix("contrib.awq_core")
    tiled = {1: group} if group else {}
    how = core.qarray.HowToQuantize(
        qtype=_TYPES[precision], channelwise_axes=(0,), tiled_axes=tiled
    )

    def one(expert: tuple[Array, Array]) -> Array:
        return 1 / core.search_optimal_scales(expert[0].T, expert[1], how)[0]

    return jax.lax.map(one, (weights, activity))


def size_of_expert(
    shape: tuple[int, int], precision: Precision, group: int = 0, *, factors: bool = False
) -> int:
    """Returns the largest number of bytes that one expert's weights ``(I, O)`` take in a file.

    Args:
        shape: Numbers ``(I, O)`` of input and output channels.
        precision: Precision of the codes.
        group: Number of input channels that share a scale; 0 for all.
        factors: True if each input channel has a factor.
    """
    inputs, outputs = shape
    codes = math.ceil(inputs * outputs * _BITS[precision] / 8)
    numbers = (inputs // group if group else 1) * outputs + (inputs if factors else 0) + 1
    return codes + numbers * _NUMBER_BYTES


def check_precision(precision: str) -> Precision:
    """Returns the precision.

    Raises:
        ConfigError: If no precision has this name, or qwix is not installed.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"bits={precision!r} is none of {', '.join(PRECISIONS)}")
    _qwix()
    return precision


def _qwix(module: str = "") -> Any:
    try:
        return importlib.import_module(f"qwix.{module}" if module else "qwix")
    except ImportError as error:
        raise ConfigError("quantisation needs qwix: pip install 'moe_jax[quantise]'") from error
