"""Multi-head attention, to the sequence itself or another, with rotary or T5 positions."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.nn.init import weight
from moe_jax.parallel import constrain

Array = jax.Array
_MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """A self-attention layer.

    Attributes:
        width: ``M``.
        num_heads: ``H`` of the queries.
        num_kv_heads: heads of keys and values; each serves ``num_heads / num_kv_heads`` queries.
        head_dim: ``D``.
        rotary: rotate queries and keys by position (Su et al. 2021, 2104.09864).
        rotary_base: slowest wavelength is ``2 * pi * rotary_base``.
        init_scale: see ``moe_jax.nn.init.weight``.
    """

    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary: bool = True
    rotary_base: float = 10000.0
    init_scale: float = 1.0


class Attention(nnx.Module):
    """Attention of a sequence to itself or to a memory; the bias is the mask."""

    def __init__(self, config: AttentionConfig, key: Array):
        """Makes ``query (M, H, D)``, ``key``/``value (M, H_kv, D)`` and ``output (H, D, M)``."""
        keys = jax.random.split(key, 4)
        m, h, kv, d = config.width, config.num_heads, config.num_kv_heads, config.head_dim
        scale, axes = config.init_scale, ("embed", "heads", "head")
        self.query = weight(keys[0], (m, h, d), axes, fan_in=m, scale=scale)
        self.key = weight(keys[1], (m, kv, d), axes, fan_in=m, scale=scale)
        self.value = weight(keys[2], (m, kv, d), axes, fan_in=m, scale=scale)
        self.output = weight(
            keys[3], (h, d, m), ("heads", "head", "embed"), fan_in=h * d, scale=scale
        )
        self.config = config

    def __call__(
        self, x: Array, bias: Array, positions: Array, memory: Array | None = None
    ) -> Array:
        """Attends.

        Args:
            x: ``(B, L, M)``.
            bias: ``(B or 1, H or 1, L, T)`` float32 added to the scores: the mask, and relative
                positions if the model has them; ``T`` is the length of what is attended to.
            positions: ``(B, L)`` int32, read by rotary positions alone.
            memory: ``(B, T, M)`` to attend to; ``x`` itself if not given.
        """
        config = self.config
        source = x if memory is None else memory
        q, k, v = (
            jnp.einsum("blm,mhd->bhld", given, kernel[...].astype(x.dtype))
            for given, kernel in ((x, self.query), (source, self.key), (source, self.value))
        )
        if config.rotary:
            sin, cos = _rotary_angles(positions, config.head_dim, config.rotary_base)
            q, k = _rotate(q, sin, cos), _rotate(k, sin, cos)
        repeats = config.num_heads // config.num_kv_heads
        k, v = (jnp.repeat(t, repeats, axis=1) if repeats > 1 else t for t in (k, v))
        q, k, v = (constrain(t, "batch", "heads", "length", "head") for t in (q, k, v))
        q = q / math.sqrt(config.head_dim)
        scores = jnp.einsum("bhqd,bhkd->bhqk", q, k).astype(jnp.float32) + bias
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        mixed = jnp.einsum("bhqk,bhkd->bhqd", weights, v)
        return jnp.einsum("bhld,hdm->blm", mixed, self.output[...].astype(x.dtype))


def causal_bias(segments: Array) -> Array:
    """Returns ``(B, 1, L, L)`` float32: 0 to earlier tokens of the same segment, else masked.

    Args:
        segments: ``(B, L)`` int32, 0 for padding.
    """
    length = segments.shape[1]
    same = segments[:, :, None] == segments[:, None, :]
    causal = jnp.tril(jnp.ones((length, length), bool))
    return jnp.where(same & causal, 0.0, _MASKED)[:, None].astype(jnp.float32)


def segment_bias(queries: Array, keys: Array) -> Array:
    """Returns ``(B, 1, L, T)`` float32: 0 to every token of the same segment, else masked.

    Args:
        queries: ``(B, L)`` int32 segments, 0 for padding.
        keys: ``(B, T)`` int32 segments.
    """
    same = queries[:, :, None] == keys[:, None, :]
    return jnp.where(same, 0.0, _MASKED)[:, None].astype(jnp.float32)


class RelativeBias(nnx.Module):
    """T5's learned relative positions: one number per head and distance bucket (1910.10683)."""

    def __init__(
        self,
        num_heads: int,
        key: Array,
        *,
        buckets: int = 32,
        max_distance: int = 128,
        both_ways: bool = False,
    ):
        """Makes the table ``(buckets, H)``; half of it is for later tokens if ``both_ways``."""
        self.table = weight(key, (buckets, num_heads), (None, "heads"), fan_in=1, scale=1e-2)
        self.max_distance = max_distance
        self.both_ways = both_ways

    def __call__(self, length: int) -> Array:
        """Returns ``(1, H, L, L)`` float32."""
        position = jnp.arange(length)
        table = self.table[...]
        distance = position[:, None] - position[None, :]
        if self.both_ways:
            half = table.shape[0] // 2
            later = jnp.where(distance < 0, half, 0)
            bucket = later + _bucket(jnp.abs(distance), half, self.max_distance)
        else:
            bucket = _bucket(jnp.maximum(distance, 0), table.shape[0], self.max_distance)
        return jnp.moveaxis(table[bucket], -1, 0)[None]


def _bucket(distance: Array, buckets: int, max_distance: int) -> Array:
    """T5's buckets of non-negative distances: half exact, the rest spaced by logarithm."""
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1) / exact) / math.log(max_distance / exact)
    spaced = exact + (ratio * (buckets - exact)).astype(jnp.int32)
    return jnp.where(distance < exact, distance, jnp.minimum(spaced, buckets - 1))


def _rotary_angles(positions: Array, dim: int, base: float) -> tuple[Array, Array]:
    frequency = base ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    angle = positions[:, None, :, None] * frequency
    return jnp.sin(angle), jnp.cos(angle)


def _rotate(x: Array, sin: Array, cos: Array) -> Array:
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
