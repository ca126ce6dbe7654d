"""Multi-head latent attention: the keys and values of all heads come from one latent per token."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from moe_jax.attend import Kernel, Options, PagedView, View, attend
from moe_jax.nn.attention import KV
from moe_jax.nn.heads import from_heads, to_heads
from moe_jax.nn.init import weight
from moe_jax.nn.norm import RMSNorm
from moe_jax.nn.positions import Rotary, rotate
from moe_jax.parallel import constrain
from moe_jax.ranges import Natural, NonNegative, Positive, Ranged


@dataclasses.dataclass(frozen=True)
class Latent(Ranged):
    """Sizes of DeepSeek's latent attention (2405.04434, section 2.1.2).

    Attributes:
        query_rank: Width of the latent vector of queries; 0 projects tokens to queries directly.
        kv_rank: Width ``R`` of the latent vector of keys and values; the cache holds this vector.
        plain_dim: Number of features per head that are not rotated.
        rotary_dim: Number of features per head that are rotated; all heads share the rotated key.
        value_dim: Number of features of a value per head.
        scale: Factor of the scores; 0 selects ``1 / sqrt(plain_dim + rotary_dim)``.
        temperature: Growth of the scores with position (Mistral 4): a query at position ``p`` is
            multiplied by ``1 + temperature * log(1 + floor(p / temperature_length))``. 0 disables
            it.
        temperature_length: Number of positions per step of ``temperature``.
    """

    query_rank: Natural = 0
    kv_rank: Positive = 512
    plain_dim: Positive = 128
    rotary_dim: Positive = 64
    value_dim: Positive = 128
    scale: NonNegative = 0.0
    temperature: NonNegative = 0.0
    temperature_length: Positive = 8192


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Configuration of a latent attention layer.

    Attributes:
        width: Width ``M`` of the tokens.
        num_heads: Number ``H`` of heads.
        latent: Sizes of latents and heads.
        rotary: Rotation of the rotated features.
        norm_eps: Number added to the mean square in the norms of the latents.
        init_scale: Scale of the initial weights, see ``moe_jax.nn.init.weight``.
        kernel: Implementation of the scores and the mix of values, see ``moe_jax.attend``.
    """

    width: int
    num_heads: int
    latent: Latent
    rotary: Rotary = Rotary()
    norm_eps: float = 1e-6
    init_scale: float = 1.0
    kernel: Kernel = "auto"

    @property
    def score_dims(self) -> int:
        """Number of multiply-adds per query and key in all heads, for scores and values."""
        latent = self.latent
        return self.num_heads * (latent.plain_dim + latent.rotary_dim + latent.value_dim)


class LatentAttention(nnx.Module):
    """Attention that expands its keys and values from a latent ``(B, T, R)``."""

    def __init__(self, config: LatentConfig, key: PRNGKeyArray):
        """Initialises the maps to and from the latents."""
        keys = jax.random.split(key, 7)
        sizes, m, h, scale = config.latent, config.width, config.num_heads, config.init_scale
        up = ("latent_embed", "heads", "head")
        rank, axes = m, ("embed", "heads", "head")
        if sizes.query_rank:
            rank, axes = sizes.query_rank, up
            down = ("embed", "latent")
            self.query_down = weight(keys[0], (m, rank), down, fan_in=m, scale=scale)
            self.query_norm = RMSNorm(rank, config.norm_eps)
        depth = sizes.plain_dim + sizes.rotary_dim
        self.query = weight(keys[1], (rank, h, depth), axes, fan_in=rank, scale=scale)
        rank = sizes.kv_rank
        self.down = weight(keys[2], (m, rank), ("embed", "latent"), fan_in=m, scale=scale)
        self.norm = RMSNorm(rank, config.norm_eps)
        rotated = (m, sizes.rotary_dim)
        self.rotated = weight(keys[3], rotated, ("embed", "head"), fan_in=m, scale=scale)
        self.key = weight(keys[4], (rank, h, sizes.plain_dim), up, fan_in=rank, scale=scale)
        self.value = weight(keys[5], (rank, h, sizes.value_dim), up, fan_in=rank, scale=scale)
        output, fan_in = (h, sizes.value_dim, m), h * sizes.value_dim
        axes = ("heads", "head", "embed")
        self.output = weight(keys[6], output, axes, fan_in=fan_in, scale=scale)
        self.config = config

    def project(self, source: Float[Array, "B T M"], positions: Int[Array, "#B T"]) -> KV:
        """Returns the latents and rotated keys of tokens, which stand for keys and values.

        Args:
            source: Tokens ``(B, T, M)``.
            positions: Positions ``(B or 1, T)`` of the tokens.

        Returns:
            ``latent (B, 1, T, R)`` and ``rotated (B, 1, T, D_r)``.
        """
        dtype = source.dtype
        latent = self.norm(jnp.einsum("btm,mr->btr", source, self.down[...].astype(dtype)))
        rotated = jnp.einsum("btm,md->btd", source, self.rotated[...].astype(dtype))[:, None]
        return {
            "latent": latent[:, None],
            "rotated": rotate(rotated, positions, self.config.rotary),
        }

    def __call__(
        self, x: Float[Array, "B L M"], view: View | PagedView, kv: KV | None = None
    ) -> Float[Array, "B L M"]:
        """Returns the output ``(B, L, M)`` of attention, for the arguments of ``Attention``."""
        sizes = self.config.latent
        kv = self.project(x, view.positions) if kv is None else kv
        q = self._queries(x, view.positions)
        if sizes.temperature:
            steps = jnp.floor(view.positions / sizes.temperature_length)
            heat = 1.0 + sizes.temperature * jnp.log1p(steps)
            q = q * heat[:, None, :, None].astype(q.dtype)
        q = constrain(q, "batch", "heads", "length", "head")
        mixed = view.over(self._mixed, q, kv).astype(x.dtype)
        return from_heads(mixed, self.output[...].astype(x.dtype))

    def _mixed(self, q: Float[Array, "B H L D"], kv: KV, view: View) -> Float[Array, "B H L V"]:
        """Returns the mixed values of queries on the latents of their keys."""
        sizes, queries, keys = self.config.latent, q.shape[2], kv["latent"].shape[2]
        in_heads = sizes.plain_dim + sizes.rotary_dim + sizes.value_dim
        in_latents = 2 * sizes.kv_rank + sizes.rotary_dim
        expansion = keys * sizes.kv_rank * (sizes.plain_dim + sizes.value_dim)
        absorbs = queries * keys * (in_latents - in_heads) < expansion
        return (self._absorbed if absorbs and not view.own else self._expanded)(q, kv, view)

    def _expanded(self, q: Float[Array, "B H L D"], kv: KV, view: View) -> Float[Array, "B H L V"]:
        """Returns the mixed values, from keys and values of every head."""
        latent, rotated = kv["latent"][:, 0], kv["rotated"]
        k = jnp.einsum("btr,rhd->bhtd", latent, self.key[...].astype(q.dtype))
        v = jnp.einsum("btr,rhd->bhtd", latent, self.value[...].astype(q.dtype))
        shared = jnp.broadcast_to(rotated, (*k.shape[:-1], rotated.shape[-1]))
        k = jnp.concatenate([k, shared], -1)
        k, v = (constrain(t, "batch", "heads", None, "head") for t in (k, v))
        return attend(q, k, v, view, self._options)

    def _absorbed(self, q: Float[Array, "B H L D"], kv: KV, view: View) -> Float[Array, "B H L V"]:
        """Returns the mixed values, from latents as the one key and the one value of all heads.

        The map of keys goes to the queries, and the map of values to the mix (2405.04434, section
        2.1.2), so that no latent is expanded.
        """
        plain, turned = jnp.split(q, [self.config.latent.plain_dim], axis=-1)
        q = jnp.einsum("bhld,rhd->bhlr", plain, self.key[...].astype(q.dtype))
        k = jnp.concatenate([kv["latent"], kv["rotated"]], -1)
        mixed = attend(jnp.concatenate([q, turned], -1), k, kv["latent"], view, self._options)
        return jnp.einsum("bhlr,rhd->bhld", mixed, self.value[...].astype(mixed.dtype))

    @property
    def _options(self) -> Options:
        sizes = self.config.latent
        scale = sizes.scale or 1 / math.sqrt(sizes.plain_dim + sizes.rotary_dim)
        return Options(scale=scale, kernel=self.config.kernel)

    def _queries(self, x: Array, positions: Array) -> Float[Array, "B H L D"]:
        """Returns the queries, whose last features are rotated."""
        if self.config.latent.query_rank:
            x = self.query_norm(jnp.einsum("blm,mr->blr", x, self.query_down[...].astype(x.dtype)))
        q = to_heads(x, self.query[...].astype(x.dtype))
        plain, turned = jnp.split(q, [self.config.latent.plain_dim], axis=-1)
        return jnp.concatenate([plain, rotate(turned, positions, self.config.rotary)], -1)
