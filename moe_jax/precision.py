"""Matrix products with a true float32 result on every kind of device.

By default an accelerator multiplies float32 tensors with fewer bits, in bfloat16 on a TPU and in
TF32 on a recent GPU, and rounds a product of bfloat16 tensors to bfloat16. The products in this
module set their precision; the page ``docs/precision.md`` lists the uses.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def exact(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Returns the precision at which a product reads every bit of operands of ``dtype``.

    Accelerators read all bits of bfloat16 at their default precision, so ``None`` lets XLA choose
    the fastest kernel.

    Args:
        dtype: Type of the operands.
    """
    return None if jnp.finfo(dtype).bits <= 16 else jax.lax.Precision.HIGHEST


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def wide_einsum(
    subscripts: str, x: Float[Array, "*shape_x"], y: Float[Array, "*shape_y"]
) -> Float[Array, "*shape"]:
    """Returns ``einsum`` of two tensors in float32 or a wider type.

    The product reads every bit of its operands and never rounds to a type narrower than float32.
    The backward pass first rounds the gradient to the type of the operands, which is exact for
    float32; without it a bfloat16 model would compute float32 products in its backward pass.

    Args:
        subscripts: Subscripts of ``einsum``.
        x: First tensor.
        y: Second tensor.
    """
    dtype = jnp.promote_types(x.dtype, y.dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    return jnp.einsum(subscripts, x, y, precision=exact(dtype), preferred_element_type=wide)


def _forward(subscripts: str, x: Array, y: Array) -> tuple[Array, tuple[Array, Array]]:
    return wide_einsum(subscripts, x, y), (x, y)


def _backward(subscripts: str, operands: tuple[Array, Array], gradient: Array):
    dtype = jnp.promote_types(*(operand.dtype for operand in operands))
    narrow, gradient = functools.partial(jnp.einsum, precision=exact(dtype)), gradient.astype(dtype)
    inputs, result = subscripts.split("->")
    first, second = inputs.split(",")
    if set(first) & set(second) & set(result):
        _, pull = jax.vjp(functools.partial(narrow, subscripts), *operands)
        return pull(gradient)
    # JAX would compute the gradient of the second operand transposed. XLA for CPUs then copies the
    # whole ``gradient`` first, and the gradient of all logits is large.
    x, y = operands
    dx = narrow(f"{result},{second}->{first}", gradient, y)
    return dx, narrow(f"{first},{result}->{second}", x, gradient)


wide_einsum.defvjp(_forward, _backward)
