"""Attention by the kernels for TPUs that JAX ships, which never write scores to memory."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as kernels
from jaxtyping import Array, Float, Int

from moe_jax.attend.options import Options
from moe_jax.attend.view import View
from moe_jax.parallel import over_heads

# A kernel reads whole blocks of tokens, and its lanes are 128 wide.
_BLOCK, _LANES = 512, 128
# The identity of a segment and a chunk is one int32: a row has fewer chunks than this.
_CHUNKS = 2**16
_PADDING = -1


def attend(
    q: Float[Array, "B H L D"],
    k: Float[Array, "B G L D"],
    v: Float[Array, "B G L V"],
    sinks: Float[Array, " H"] | None,
    view: View,
    options: Options,
    interpret: bool = False,
) -> Float[Array, "B H L V"]:
    """Returns the mixed values ``(B, H, L, V)`` of all queries; see ``moe_jax.attend.attend``.

    The kernel counts a window by index, which is by position because positions count up by one
    within a segment. A chunk is part of the identity of a segment.

    Args:
        q: Queries ``(B, H, L, D)``.
        k: Keys ``(B, G, L, D)`` of the queries' own tokens.
        v: Values ``(B, G, L, V)``.
        sinks: Scores ``(H,)`` without values, or ``None``.
        view: Mask of queries and keys.
        options: Scale, window and chunk.
        interpret: True runs the kernel's program by XLA, on any device.
    """
    length = q.shape[2]
    block = min(_BLOCK, -(-length // _LANES) * _LANES)
    padding = -length % block
    if options.scale != 1.0:
        q = (q * options.scale).astype(q.dtype)
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0))) for x in (q, k, v))
    ids = jnp.pad(
        _identities(view, options.chunk), ((0, 0), (0, padding)), constant_values=_PADDING
    )
    call = functools.partial(_call, view.causal, options.window, block, interpret)
    if q.dtype == jnp.float32:
        call = functools.partial(_exact, call)
    if sinks is None:
        mixed = over_heads(lambda q, k, v, ids: call(q, k, v, ids, None), (q, k, v), (ids,))
    else:
        mixed = over_heads(
            lambda q, k, v, ids, sinks: call(q, k, v, ids, sinks), (q, k, v), (ids,), (sinks,)
        )
    return mixed[:, :, :length].astype(v.dtype)


def _identities(view: View, chunk: int) -> Int[Array, "B L"]:
    """Returns a number ``(B, L)`` that two tokens share if they have one segment and one chunk."""
    if not chunk:
        return view.segments
    return view.segments * _CHUNKS + view.positions // chunk


def _call(
    causal: bool,
    window: int,
    block: int,
    interpret: bool,
    q: Array,
    k: Array,
    v: Array,
    ids: Array,
    sinks: Array | None,
) -> Array:
    """Returns the mixed values of the rows and heads of one device."""
    shape = (q.shape[2], q.shape[2])
    mask: kernels.Mask
    if window:
        mask = kernels.LocalMask(shape, (window - 1, 0 if causal else None), 0)
    else:
        mask = kernels.CausalMask(shape) if causal else kernels.FullMask(shape)
    sizes = kernels.BlockSizes(*(block,) * 8)
    kernel = kernels.make_splash_mha_single_device(
        kernels.MultiHeadMask([mask] * q.shape[1]), block_sizes=sizes, interpret=interpret
    )

    def row(q: Array, k: Array, v: Array, ids: Array) -> Array:
        return kernel(q, k, v, kernels.SegmentIds(ids, ids), sinks)

    return jax.vmap(row)(q, k, v, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exact(call: Any, *arrays: Any) -> Array:
    """Returns ``call(*arrays)``, whose products read every bit of float32, backward too."""
    with jax.default_matmul_precision("highest"):
        return call(*arrays)


def _forward(call: Any, *arrays: Any) -> tuple[Array, Any]:
    with jax.default_matmul_precision("highest"):
        return jax.vjp(call, *arrays)


def _backward(call: Any, pull: Any, gradient: Array) -> Any:
    del call
    with jax.default_matmul_precision("highest"):
        return pull(gradient)


_exact.defvjp(_forward, _backward)
