"""Attention by cuDNN on a GPU, through ``jax.nn.dot_product_attention``."""

from __future__ import annotations

from typing import Literal

import jax
from jaxtyping import Array, Float

from moe_jax.attend.options import Options
from moe_jax.attend.view import View


def attend(
    q: Float[Array, "B H L D"],
    k: Float[Array, "B G L D"],
    v: Float[Array, "B G L D"],
    sinks: None,
    view: View,
    options: Options,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B H L D"]:
    """Returns the mixed values ``(B, H, L, D)`` of all queries; see ``moe_jax.attend.attend``.

    The kernel keeps sums of scores in float32 and writes no scores. Segments, windows and chunks
    reach it as one mask for all heads.

    Args:
        q: Queries ``(B, H, L, D)``.
        k: Keys ``(B, G, L, D)`` of the queries' own tokens.
        v: Values ``(B, G, L, D)``.
        sinks: ``None``: the kernel has no sinks.
        view: Mask of queries and keys.
        options: Scale, window and chunk.
        implementation: Name of the implementation in JAX.
    """
    del sinks
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    mixed = jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=view.mask(options.window, options.chunk)[:, None],
        scale=options.scale,
        is_causal=view.causal,
        implementation=implementation,
    )
    return mixed.swapaxes(1, 2)
