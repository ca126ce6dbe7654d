"""The projections between tokens and experts of a narrower width (LatentMoE, 2601.18089)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from moe_jax.nn.init import weight


class LatentSpace(nnx.Module):
    """The projection of tokens to the width ``R`` of the experts, and of their sums back.

    Neither projection has a bias, so that the output of a token without an expert stays zero. Both
    are outside the exchange between devices, which therefore sends rows of width ``R``.
    """

    def __init__(self, width: int, latent_dim: int, key: PRNGKeyArray, scale: float):
        """Initialises ``down (M, R)`` and ``up (R, M)``.

        Args:
            width: Width ``M`` of the tokens.
            latent_dim: Width ``R`` of the experts' inputs and outputs.
            key: Random key.
            scale: Scale of the initial weights, see ``moe_jax.nn.init.weight``.
        """
        down_key, up_key = jax.random.split(key)
        shape, axes = (width, latent_dim), ("embed", "latent")
        self.down = weight(down_key, shape, axes, fan_in=width, scale=scale)
        self.up = weight(up_key, shape[::-1], axes[::-1], fan_in=latent_dim, scale=scale)

    def project(self, tokens: Float[Array, "G S M"]) -> Float[Array, "G S R"]:
        """Returns the inputs of the experts."""
        return jnp.einsum("gsm,mr->gsr", tokens, self.down[...].astype(tokens.dtype))

    def restore(self, sums: Float[Array, "G S R"]) -> Float[Array, "G S M"]:
        """Returns the output of the layer for the weighted sums of the experts' outputs."""
        return jnp.einsum("gsr,rm->gsm", sums, self.up[...].astype(sums.dtype))
