"""Multi-head attention of queries to the sequence itself or to a memory."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from moe_jax.attend import Kernel, Options, PagedView, View, attend
from moe_jax.nn.heads import from_heads, to_heads
from moe_jax.nn.init import constant, weight
from moe_jax.nn.norm import unit_rms
from moe_jax.nn.positions import Rotary, rotate
from moe_jax.parallel import constrain
from moe_jax.ranges import Natural, NonNegative, Positive, Ranged

# The keys and values of one attention, by name.
KV = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Details(Ranged):
    """Options of multi-head attention in published models.

    Attributes:
        qkv_bias: True adds biases to queries, keys and values.
        output_bias: True adds a bias to the output.
        qk_norm: Norm of queries and keys: ``head`` (RMS norm over each head, learned scale; Qwen3),
            ``width`` (RMS norm over all heads together, learned scale; OLMoE), ``rotated`` (as
            ``head``, but after rotation; Hunyuan) or ``unit`` (RMS norm over each head after
            rotation, no learned scale; Llama 4).
        clip: Bound of queries, keys and values, which are clipped to ``[-clip, clip]`` (DBRX); 0
            disables clipping.
        sinks: True adds a learned score per head to the softmax; the score takes weight from the
            keys and has no value (gpt-oss).
        scale: Factor of the scores (T5: 1); 0 selects ``1 / sqrt(D)``.
        window: Number of tokens that a query attends to, its own token included; 0 means all.
        chunk: Number of positions per chunk; a query attends only within its chunk (Llama 4). 0
            means no chunks.
        temperature: Growth of the scores with position (Llama 4's layers without rotation): a query
            at position ``p`` is multiplied by ``1 + temperature * log(1 + floor((p + 1) /
            temperature_length))``. 0 disables it.
        temperature_length: Number of positions per step of ``temperature``.
        value_norm: True divides each head of the values by its root mean square (Gemma 4).
        keys_as_values: True takes the projected keys, before their norm and rotation, for the
            values, which have no map of their own (Gemma 4's layers without a window).
        output_gate: True multiplies the heads, before the map of the output, by the sigmoid of a
            map of the tokens (2505.06708; AFMoE).
    """

    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: Literal["none", "head", "width", "rotated", "unit"] = "none"
    clip: NonNegative = 0.0
    sinks: bool = False
    scale: NonNegative = 0.0
    window: Natural = 0
    chunk: Natural = 0
    temperature: NonNegative = 0.0
    temperature_length: Positive = 8192
    value_norm: bool = False
    keys_as_values: bool = False
    output_gate: bool = False


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Configuration of an attention layer.

    Attributes:
        width: Width ``M`` of the tokens.
        num_heads: Number ``H`` of query heads.
        num_kv_heads: Number ``H_kv`` of key and value heads; each head serves
            ``num_heads / num_kv_heads`` query heads.
        head_dim: Width ``D`` of a head.
        rotary: Rotation of queries and keys; ``None`` means no rotation.
        details: Additions to plain attention.
        norm_eps: Number added to the mean square in the norm of queries and keys.
        init_scale: Scale of the initial weights, see ``moe_jax.nn.init.weight``.
        kernel: Implementation of the scores and the mix of values, see ``moe_jax.attend``.
    """

    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary: Rotary | None = Rotary()
    details: Details = Details()
    norm_eps: float = 1e-6
    init_scale: float = 1.0
    kernel: Kernel = "auto"

    @property
    def score_dims(self) -> int:
        """Number of multiply-adds per query and key in all heads, for scores and values."""
        return 2 * self.num_heads * self.head_dim


class Attention(nnx.Module):
    """Attention of queries to the keys and values of the same sequence or of a memory."""

    def __init__(self, config: AttentionConfig, key: PRNGKeyArray):
        """Initialises ``query (M, H, D)``, ``key, value (M, H_kv, D)`` and ``output (H, D, M)``.

        Norms, biases, sinks and ``output_gate (M, H, D)`` exist if ``config.details`` asks for
        them, and values have a map of their own unless it takes keys for them.
        """
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
            if not details.keys_as_values:
                self.value_bias = constant(0.0, (kv, d), axes[1:])
        if details.output_bias:
            self.output_bias = constant(0.0, (m,), ("embed",))
        if details.qk_norm in ("head", "width", "rotated"):
            shared = details.qk_norm != "width"
            self.query_norm = constant(1.0, (d,) if shared else (h, d), axes[2 if shared else 1 :])
            self.key_norm = constant(1.0, (d,) if shared else (kv, d), axes[2 if shared else 1 :])
        if details.sinks:
            self.sinks = constant(0.0, (h,), ("heads",))
        if details.output_gate:
            gate_key = jax.random.fold_in(key, 4)
            self.output_gate = weight(gate_key, (m, h, d), axes, fan_in=m, scale=scale)

    def _make_maps(self, keys: Key[Array, " 3"]) -> None:
        """Initialises the maps of queries, keys and values."""
        config, axes = self.config, ("embed", "heads", "head")
        m, h, kv, d = config.width, config.num_heads, config.num_kv_heads, config.head_dim
        scale = config.init_scale
        self.query = weight(keys[0], (m, h, d), axes, fan_in=m, scale=scale)
        self.key = weight(keys[1], (m, kv, d), axes, fan_in=m, scale=scale)
        if not config.details.keys_as_values:
            self.value = weight(keys[2], (m, kv, d), axes, fan_in=m, scale=scale)

    def project(self, source: Float[Array, "B T N"], positions: Int[Array, "#B T"]) -> KV:
        """Returns the keys and values ``(B, H_kv, T, D)`` of tokens.

        Args:
            source: Tokens ``(B, T, M)``, or their projections if experts have projected them.
            positions: Positions ``(B or 1, T)`` of the tokens.
        """
        config, details = self.config, self.config.details
        mapped = self._mapped_with_bias(source, "key")
        key = self._normed(mapped, "key")
        if config.rotary is not None:
            key = rotate(key, positions, config.rotary)
        value = mapped if details.keys_as_values else self._mapped_with_bias(source, "value")
        value = self._normed(value, "value")
        return {"key": self._after_rotation(key, "key"), "value": value}

    def __call__(
        self, x: Float[Array, "B L N"], view: View | PagedView, kv: KV | None = None
    ) -> Float[Array, "B L M"]:
        """Returns the output ``(B, L, M)`` of attention.

        Args:
            x: Tokens ``(B, L, M)``, or their projections if experts have projected them.
            view: Mask and positions.
            kv: Keys and values from ``project``; ``None`` projects them from ``x``.
        """
        config, details = self.config, self.config.details
        kv = self.project(x, view.positions) if kv is None else kv
        q = self._normed(self._mapped_with_bias(x, "query"), "query")
        if config.rotary is not None:
            q = rotate(q, view.positions, config.rotary)
        q = self._after_rotation(q, "query")
        if details.temperature:
            steps = jnp.floor((view.positions + 1.0) / details.temperature_length)
            heat = 1.0 + details.temperature * jnp.log1p(steps)
            q = q * heat[:, None, :, None].astype(q.dtype)
        q = constrain(q, "batch", "heads", "length", "head")
        q = q * details.scale if details.scale else q / math.sqrt(config.head_dim)
        reach = details.window or details.chunk
        mixed = view.over(self._mixed, q, kv, reach).astype(x.dtype)
        if details.output_gate:
            mixed = mixed * jax.nn.sigmoid(self._mapped(x, "output_gate"))
        y = self._output(mixed)
        return y + self.output_bias[...].astype(x.dtype) if details.output_bias else y

    def _mixed(self, q: Float[Array, "B H L D"], kv: KV, view: View) -> Float[Array, "B H L D"]:
        details = self.config.details
        k, v = (constrain(kv[name], "batch", "heads", None, "head") for name in ("key", "value"))
        options = Options(window=details.window, chunk=details.chunk, kernel=self.config.kernel)
        return attend(q, k, v, view, options, self.sinks[...] if details.sinks else None)

    def _mapped(self, x: Float[Array, "B L N"], name: str) -> Float[Array, "B H L D"]:
        return to_heads(x, getattr(self, name)[...].astype(x.dtype))

    def _output(self, mixed: Float[Array, "B H L D"]) -> Float[Array, "B L M"]:
        return from_heads(mixed, self.output[...].astype(mixed.dtype))

    def _mapped_with_bias(self, x: Float[Array, "B L N"], name: str) -> Float[Array, "B H L D"]:
        y = self._mapped(x, name)
        if self.config.details.qkv_bias:
            y += getattr(self, f"{name}_bias")[...].astype(x.dtype)[:, None]
        return y

    def _normed(self, x: Float[Array, "B H L D"], name: str) -> Float[Array, "B H L D"]:
        """Returns queries, keys or values with the norm and the bound that come first."""
        details, norm, y = self.config.details, f"{name}_norm", x
        if name == "value" and details.value_norm:
            y = unit_rms(y, self.config.norm_eps)
        if name != "value" and details.qk_norm == "head":
            y = unit_rms(y, self.config.norm_eps) * getattr(self, norm)[...]
        if name != "value" and details.qk_norm == "width":
            square = jnp.square(y.astype(jnp.float32)).mean((1, 3), keepdims=True)
            y = y * jax.lax.rsqrt(square + self.config.norm_eps) * getattr(self, norm)[...][:, None]
        if details.clip:
            y = jnp.clip(y, -details.clip, details.clip)
        return y.astype(x.dtype)

    def _after_rotation(self, x: Float[Array, "B H L D"], name: str) -> Float[Array, "B H L D"]:
        if self.config.details.qk_norm == "rotated":
            scale = getattr(self, f"{name}_norm")[...]
            return (unit_rms(x, self.config.norm_eps) * scale).astype(x.dtype)
        if self.config.details.qk_norm != "unit" or self.config.rotary is None:
            return x
        return unit_rms(x, self.config.norm_eps).astype(x.dtype)
