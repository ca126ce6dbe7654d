"""The factors by which an MoE layer multiplies its routed and its shared output."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.nn.shared import Shared
from moe_jax.precision import wide_einsum


def factors(
    shared: Shared,
    x: Float[Array, "B L M"],
    routed: Float[Array, "B L M"],
    residual: Float[Array, "B L M"] | None,
) -> Float[Array, "B L 2"]:
    """Returns the factors of the routed and of the shared output of each token, float32.

    A factor is the learned gate, times the reciprocal of the root mean square if the layer
    normalises both outputs; the learned scale of a norm is not part of it.

    Args:
        shared: The shared network and its gate.
        x: Input of the layer.
        routed: Output of the experts.
        residual: Tokens before the norm of the layer; ``None`` if the layer has no norm.
    """
    found, wide = jnp.ones((*x.shape[:2], 2), jnp.float32), x.astype(jnp.float32)
    if shared.config.norms:
        done = shared.network(shared.norm(x if residual is None else residual))
        eps = shared.output_norm.eps
        found = jnp.stack([_reciprocal_rms(y, eps) for y in (routed, done)], axis=-1)
    if shared.config.mix == "sum":
        return found
    logits = wide_einsum("blm,mo->blo", wide, shared.gate[...])
    if shared.config.mix == "softmax":
        return found * jax.nn.softmax(logits)
    gate = jax.nn.sigmoid(logits)
    first = jnp.ones_like(gate) if shared.config.mix == "sigmoid" else gate
    last = gate if shared.config.mix == "sigmoid" else 1 - gate
    return found * jnp.concatenate([first, last], axis=-1)


def _reciprocal_rms(y: Float[Array, "B L M"], eps: float) -> Float[Array, "B L"]:
    return jax.lax.rsqrt(jnp.square(y.astype(jnp.float32)).mean(-1) + eps)
