"""Multi-head attention, to the sequence itself or to a memory, and its masks."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.nn.init import constant, weight
from moe_jax.nn.norm import unit_rms
from moe_jax.nn.positions import Rotary, rotate
from moe_jax.parallel import constrain
from moe_jax.precision import wide_einsum
from moe_jax.ranges import Natural, NonNegative, Positive, Ranged

Array = jax.Array
KV = dict[str, Array]
_MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class Details(Ranged):
    """What published attentions add to the plain one.

    Attributes:
        qkv_bias: biases of queries, keys and values.
        output_bias: bias of the output.
        qk_norm: of queries and keys: ``head`` (RMS over each head, learned; Qwen3), ``width`` (RMS
            over all heads together, learned; OLMoE), ``unit`` (RMS over each head after rotation,
            nothing learned; Llama 4).
        clip: queries, keys and values are cut to ``[-clip, clip]``; 0 for no cut (DBRX).
        sinks: a learned score per head that takes weight and gives nothing (gpt-oss).
        scale: of the scores; 0 for ``1 / sqrt(D)`` (T5: 1).
        window: tokens seen, itself included; 0 for all.
        chunk: attention stays within chunks of so many positions; 0 for none (Llama 4).
        temperature: queries at position ``p`` are multiplied by ``1 + temperature * log(1 +
            floor((p + 1) / temperature_length))`` (Llama 4's layers without rotation).
        temperature_length: see ``temperature``.
    """

    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: Literal["none", "head", "width", "unit"] = "none"
    clip: NonNegative = 0.0
    sinks: bool = False
    scale: NonNegative = 0.0
    window: Natural = 0
    chunk: Natural = 0
    temperature: NonNegative = 0.0
    temperature_length: Positive = 8192


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """An attention layer.

    Attributes:
        width: ``M``.
        num_heads: ``H`` of the queries.
        num_kv_heads: heads of keys and values; each serves ``num_heads / num_kv_heads`` queries.
        head_dim: ``D``.
        rotary: rotation of queries and keys; ``None`` for none.
        details: what else there is.
        norm_eps: of the norm of queries and keys.
        init_scale: see ``moe_jax.nn.init.weight``.
    """

    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary: Rotary | None = Rotary()
    details: Details = Details()
    norm_eps: float = 1e-6
    init_scale: float = 1.0

    @property
    def score_dims(self) -> int:
        """Multiply-adds per query and key, all heads: scores and mixing of values."""
        return 2 * self.num_heads * self.head_dim


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """What queries see of the keys.

    Attributes:
        bias: ``(B or 1, H or 1, L, T)`` float32 added to the scores: the mask, and relative
            positions if the model has them.
        positions: ``(B, L)`` int32 of the queries.
        key_positions: ``(B, T)`` int32; ``None`` for those of the queries.
        start: where in a cache the keys of these tokens go.
    """

    bias: Array
    positions: Array
    key_positions: Array | None = None
    start: Array | int = 0

    @property
    def distance(self) -> Array:
        """``(B, L, T)`` int32, how far before a query a key stands."""
        return self.positions[:, :, None] - self._keys[:, None, :]

    def same_chunk(self, size: int) -> Array:
        """Returns ``(B, L, T)`` bool."""
        return self.positions[:, :, None] // size == self._keys[:, None, :] // size

    @property
    def _keys(self) -> Array:
        return self.positions if self.key_positions is None else self.key_positions


class Attention(nnx.Module):
    """Attention of queries to keys and values of the same sequence or of a memory."""

    def __init__(self, config: AttentionConfig, key: Array):
        """Makes ``query (M, H, D)``, ``key``, ``value (M, H_kv, D)``, ``output (H, D, M)``."""
        keys = jax.random.split(key, 4)
        m, h, kv, d = config.width, config.num_heads, config.num_kv_heads, config.head_dim
        scale, axes = config.init_scale, ("embed", "heads", "head")
        self.config = config
        self._make_maps(keys[:3])
        self.output = weight(
            keys[3], (h, d, m), ("heads", "head", "embed"), fan_in=h * d, scale=scale
        )
        details = config.details
        if details.qkv_bias:
            self.query_bias = constant(0.0, (h, d), axes[1:])
            self.key_bias = constant(0.0, (kv, d), axes[1:])
            self.value_bias = constant(0.0, (kv, d), axes[1:])
        if details.output_bias:
            self.output_bias = constant(0.0, (m,), ("embed",))
        if details.qk_norm in ("head", "width"):
            shared = details.qk_norm == "head"
            self.query_norm = constant(1.0, (d,) if shared else (h, d), axes[2 if shared else 1 :])
            self.key_norm = constant(1.0, (d,) if shared else (kv, d), axes[2 if shared else 1 :])
        if details.sinks:
            self.sinks = constant(0.0, (h,), ("heads",))

    def _make_maps(self, keys: Array) -> None:
        config, axes = self.config, ("embed", "heads", "head")
        m, h, kv, d = config.width, config.num_heads, config.num_kv_heads, config.head_dim
        scale = config.init_scale
        self.query = weight(keys[0], (m, h, d), axes, fan_in=m, scale=scale)
        self.key = weight(keys[1], (m, kv, d), axes, fan_in=m, scale=scale)
        self.value = weight(keys[2], (m, kv, d), axes, fan_in=m, scale=scale)

    def project(self, source: Array, positions: Array) -> KV:
        """Returns keys and values ``(B, H_kv, T, D)`` of ``source (B, T, M)``."""
        config = self.config
        key = self._projected(source, "key")
        if config.rotary is not None:
            key = rotate(key, positions, config.rotary)
        value = self._projected(source, "value")
        return {"key": self._after_rotation(key), "value": value}

    def __call__(self, x: Array, view: View, kv: KV | None = None) -> Array:
        """Attends.

        Args:
            x: ``(B, L, M)``.
            view: what each query sees.
            kv: keys and values from ``project``; those of ``x`` itself if not given.

        Returns:
            ``(B, L, M)``.
        """
        config, details = self.config, self.config.details
        kv = self.project(x, view.positions) if kv is None else kv
        q = self._projected(x, "query")
        if config.rotary is not None:
            q = rotate(q, view.positions, config.rotary)
        q = self._after_rotation(q)
        if details.temperature:
            steps = jnp.floor((view.positions + 1.0) / details.temperature_length)
            heat = 1.0 + details.temperature * jnp.log1p(steps)
            q = q * heat[:, None, :, None].astype(q.dtype)
        repeats = config.num_heads // config.num_kv_heads
        k, v = (
            jnp.repeat(t, repeats, axis=1) if repeats > 1 else t for t in (kv["key"], kv["value"])
        )
        q = constrain(q, "batch", "heads", "length", "head")
        k, v = (constrain(t, "batch", "heads", None, "head") for t in (k, v))
        q = q * details.scale if details.scale else q / math.sqrt(config.head_dim)
        scores = wide_einsum("bhqd,bhkd->bhqk", q, k) + view.bias
        scores += local_bias(view, details.window, details.chunk)
        weights = softmax(scores, self.sinks[...] if details.sinks else None).astype(x.dtype)
        mixed = wide_einsum("bhqk,bhkd->bhqd", weights, v).astype(x.dtype)
        done = jnp.einsum("bhld,hdm->blm", mixed, self.output[...].astype(x.dtype))
        return done + self.output_bias[...].astype(x.dtype) if details.output_bias else done

    def _mapped(self, x: Array, name: str) -> Array:
        return jnp.einsum("blm,mhd->bhld", x, getattr(self, name)[...].astype(x.dtype))

    def _projected(self, x: Array, name: str) -> Array:
        details, norm = self.config.details, f"{name}_norm"
        y = self._mapped(x, name)
        if details.qkv_bias:
            y += getattr(self, f"{name}_bias")[...].astype(x.dtype)[:, None]
        if name != "value" and details.qk_norm == "head":
            y = unit_rms(y, self.config.norm_eps) * getattr(self, norm)[...]
        if name != "value" and details.qk_norm == "width":
            square = jnp.square(y.astype(jnp.float32)).mean((1, 3), keepdims=True)
            y = y * jax.lax.rsqrt(square + self.config.norm_eps) * getattr(self, norm)[...][:, None]
        if details.clip:
            y = jnp.clip(y, -details.clip, details.clip)
        return y.astype(x.dtype)

    def _after_rotation(self, x: Array) -> Array:
        if self.config.details.qk_norm != "unit" or self.config.rotary is None:
            return x
        return unit_rms(x, self.config.norm_eps).astype(x.dtype)


def softmax(scores: Array, sinks: Array | None) -> Array:
    """Returns weights ``(B, H, L, T)``; ``sinks (H,)`` are scores that take weight for nothing."""
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    column = jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:-1], 1))
    return jax.nn.softmax(jnp.concatenate([scores, column], axis=-1), axis=-1)[..., :-1]


def local_bias(view: View, window: int, chunk: int) -> Array | float:
    """Returns ``(B, 1, L, T)`` float32 that masks what is out of the window or in another chunk."""
    bias: Array | float = 0.0
    if window:
        bias = bias + jnp.where(view.distance < window, 0.0, _MASKED)[:, None]
    if chunk:
        bias = bias + jnp.where(view.same_chunk(chunk), 0.0, _MASKED)[:, None]
    return bias


def causal_bias(segments: Array) -> Array:
    """Returns ``(B, 1, L, L)`` float32: 0 to earlier tokens of the same segment, else masked.

    Args:
        segments: ``(B, L)`` int32, 0 for padding.
    """
    place = jnp.arange(segments.shape[1])
    return cached_bias(segments, segments, place)


def cached_bias(queries: Array, keys: Array, place: Array) -> Array:
    """Returns ``(B, 1, L, T)`` float32: 0 to keys of the same segment up to the query's own place.

    Args:
        queries: ``(B, L)`` int32 segments, 0 for padding.
        keys: ``(B, T)`` int32 segments of all keys there are.
        place: ``(L,)`` int32, which key is the query's own.
    """
    same = queries[:, :, None] == keys[:, None, :]
    causal = jnp.arange(keys.shape[1]) <= place[:, None]
    return jnp.where(same & causal, 0.0, _MASKED)[:, None].astype(jnp.float32)


def segment_bias(queries: Array, keys: Array) -> Array:
    """Returns ``(B, 1, L, T)`` float32: 0 to every token of the same segment, else masked.

    Args:
        queries: ``(B, L)`` int32 segments, 0 for padding.
        keys: ``(B, T)`` int32 segments.
    """
    same = queries[:, :, None] == keys[:, None, :]
    return jnp.where(same, 0.0, _MASKED)[:, None].astype(jnp.float32)
