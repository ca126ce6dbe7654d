"""Matrix products whose result is float32 in fact, on every kind of device.

An accelerator multiplies float32 tensors at its default precision, in bfloat16 on a TPU and in TF32
on a recent GPU, and a product of bfloat16 tensors is rounded to bfloat16 unless it asks for more.
The products here say their precision; the page ``docs/precision.md`` lists which products they are.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

Array = jax.Array


def exact(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Returns the precision at which a product reads every bit of operands of ``dtype``.

    Accelerators read all bits of bfloat16 at their default precision, so ``None`` leaves them the
    choice of their fastest kernel.
    """
    return None if jnp.finfo(dtype).bits <= 16 else jax.lax.Precision.HIGHEST


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def wide_einsum(subscripts: str, x: Array, y: Array) -> Array:
    """Returns ``einsum`` of two tensors in float32 at least.

    The product reads every bit of its operands and rounds to nothing narrower than float32. Its
    gradient is rounded to the operands' type before it is multiplied, which is exact for float32;
    otherwise a bfloat16 model would pay for float32 products in its backward pass.
    """
    dtype = jnp.promote_types(x.dtype, y.dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    return jnp.einsum(subscripts, x, y, precision=exact(dtype), preferred_element_type=wide)


def _forward(subscripts: str, x: Array, y: Array) -> tuple[Array, tuple[Array, Array]]:
    return wide_einsum(subscripts, x, y), (x, y)


def _backward(subscripts: str, operands: tuple[Array, Array], gradient: Array):
    dtype = jnp.promote_types(*(operand.dtype for operand in operands))
    narrow = functools.partial(jnp.einsum, subscripts, precision=exact(dtype))
    _, pull = jax.vjp(narrow, *operands)
    return pull(gradient.astype(dtype))


wide_einsum.defvjp(_forward, _backward)
