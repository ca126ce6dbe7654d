"""Quantised experts as a store holds them, and their weights as a program computes them."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from moe_jax.errors import ConfigError
from moe_jax.offload.store import ExpertArrays
from moe_jax.quantised.codes import PRECISIONS, Precision, quantise
from moe_jax.quantised.packed import bytes_of

_MATRICES = ("up", "gate", "down")


def quantised_expert(own: ExpertArrays, precision: Precision, group: int = 0) -> ExpertArrays:
    """Returns an expert with codes and scales in place of its matrices.

    Args:
        own: Matrices ``name (N, M)`` and biases ``name_bias (N,)``, as from ``arrays_of``.
        precision: ``int8``, ``int4`` or ``fp8``.
        group: Number of inputs that share a scale; 0 for all.

    Returns:
        Codes ``name_PRECISION`` and scales ``name_scales (N, M / group)`` float32 of each matrix,
        and the biases. Codes are bytes ``(N, M)``; for ``int4``, they are ``(N, M / 2)``, and a
        byte has the earlier of two codes in its lower half.

    Raises:
        ConfigError: If the group does not divide the inputs, the number of inputs is odd with
            ``int4``, or qwix is not installed.
    """
    found = {name: array for name, array in own.items() if name.endswith("_bias")}
    for name in _MATRICES:
        if name in own:
            outputs, inputs = own[name].shape
            _check(name, inputs, precision, group)
            codes = quantise(jnp.asarray(own[name]).T[None], precision, group)
            data = bytes_of(np.asarray(codes.values[0].T)[None], precision)
            found[f"{name}_{precision}"] = data.reshape(outputs, -1)
            found[f"{name}_scales"] = np.asarray(codes.scales[0].T)
    return found


def weights_of(own: Mapping[str, Array], dtype: jnp.dtype) -> dict[str, Array]:
    """Returns the matrices ``(N, M)`` and biases ``(N,)`` of an expert, from whatever form it has.

    Args:
        own: Arrays of an expert as a store holds them; compiled programs may call this function.
        dtype: Type of the result.
    """
    found = {name: own[name].astype(dtype) for name in own if name.endswith("_bias")}
    for name in _MATRICES:
        if name in own:
            found[name] = own[name].astype(dtype)
        for precision in PRECISIONS:
            if f"{name}_{precision}" in own:
                codes = _codes(own[f"{name}_{precision}"], precision)
                found[name] = _scaled(codes, own[f"{name}_scales"]).astype(dtype)
    return found


def _codes(data: UInt8[Array, "N B"], precision: Precision) -> Float[Array, "N M"]:
    """Returns codes as float32."""
    if precision == "fp8":
        return jax.lax.bitcast_convert_type(data, jnp.float8_e4m3fn).astype(jnp.float32)
    signed = jax.lax.bitcast_convert_type(data, jnp.int8)
    if precision == "int4":
        # Shifts of signed numbers repeat the sign.
        signed = jnp.stack([signed << 4 >> 4, signed >> 4], axis=-1).reshape(len(data), -1)
    return signed.astype(jnp.float32)


def _scaled(codes: Float[Array, "N M"], scales: Float[Array, "N G"]) -> Float[Array, "N M"]:
    parts = codes.reshape(*scales.shape, -1) * scales[..., None]
    return parts.reshape(codes.shape)


def _check(name: str, inputs: int, precision: Precision, group: int) -> None:
    if group < 0 or (group and inputs % group):
        raise ConfigError(
            f"group={group} does not divide the {inputs} inputs of {name}: use a divisor, or 0 for "
            "one scale per output"
        )
    if precision == "int4" and inputs % 2:
        raise ConfigError(f"{name} has {inputs} inputs, and int4 needs an even number: use int8")
