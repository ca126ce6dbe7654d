"""Attention of queries to keys, by the implementation that suits the platform."""

from __future__ import annotations

from jaxtyping import Array, Float

from moe_jax.attend.choice import IMPLEMENTATIONS, Needs, choose
from moe_jax.attend.options import Options
from moe_jax.attend.view import View

_PLAIN = Options()


def attend(
    q: Float[Array, "B H L D"],
    k: Float[Array, "B G T D"],
    v: Float[Array, "B G T V"],
    view: View,
    options: Options = _PLAIN,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "B H L V"]:
    """Returns the mixed values ``(B, H, L, V)`` of all queries.

    Products of scores and of values are float32 sums. An attention that the implementation of the
    setting cannot express, such as one that reads a cache, is computed in blocks.

    Args:
        q: Queries ``(B, H, L, D)``.
        k: Keys ``(B, G, T, D)``; ``H / G`` successive query heads share a head.
        v: Values ``(B, G, T, V)``.
        view: Mask of queries and keys.
        options: Scale, window, chunk and the name of the implementation.
        sinks: Scores ``(H,)`` that take part in the softmax and have no value, or ``None``.
    """
    needs = Needs(
        dtype=str(q.dtype),
        heads=q.shape[1],
        kv_heads=k.shape[1],
        key_dim=q.shape[3],
        value_dim=v.shape[3],
        own=view.own,
        relative=view.relative is not None,
        sinks=sinks is not None,
    )
    name = choose(options.kernel, needs).name
    return IMPLEMENTATIONS[name].attend(q, k, v, sinks, view, options)
