"""Decoder-only language model with mixture-of-experts layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.errors import ConfigError
from moe_jax.models.stack import Remat, Stack
from moe_jax.nn.attention import AttentionConfig, RelativeBias, causal_bias
from moe_jax.nn.block import BlockConfig, Context
from moe_jax.nn.feed_forward import Activation, FeedForwardConfig
from moe_jax.nn.init import weight
from moe_jax.nn.mode import EVAL, Mode
from moe_jax.nn.moe import MoEAux, MoEConfig
from moe_jax.nn.norm import RMSNorm
from moe_jax.parallel import constrain

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer.

    Attributes:
        num_layers: dense and MoE layers together.
        width: ``M``.
        num_heads: ``H``.
        num_kv_heads: heads of keys and values; 0 for ``num_heads``.
        head_dim: ``D``.
        mlp_dim: ``F`` of the dense layers.
        activation: of dense layers and experts.
        gated: gated linear units in dense layers and experts.
        positions: ``rotary``, or ``t5_relative``: one learned bias table for all layers.
        tie_embeddings: the head is the transposed embedding.
        dropout: of residual branches in training.
        init_scale: scale of the truncated normals (Switch section 2.4 uses 0.1).
        norm_eps: of RMSNorm.
        scan_layers: compile repeating layers once; results are the same, except that Adafactor
            then clips and scales the stacked layers as one array.
        remat: what the backward pass recomputes: ``none``, ``full`` (everything), ``dots`` (keep
            matrix products), ``dots_no_batch`` (keep products with weights).
        compute_dtype: of activations; parameters, router, norms and softmax stay float32.
        moe: the mixture-of-experts layers.
    """

    num_layers: int = 4
    width: int = 128
    num_heads: int = 4
    num_kv_heads: int = 0
    head_dim: int = 32
    mlp_dim: int = 512
    activation: Activation = "gelu"
    gated: bool = False
    positions: Literal["rotary", "t5_relative"] = "rotary"
    tie_embeddings: bool = True
    dropout: float = 0.0
    init_scale: float = 1.0
    norm_eps: float = 1e-6
    scan_layers: bool = True
    remat: Remat = "none"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    moe: MoEConfig = MoEConfig()

    def __post_init__(self):
        for name in ("num_layers", "width", "num_heads", "head_dim", "mlp_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name}={getattr(self, name)} must be at least 1")
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise ConfigError(
                f"model.num_heads={self.num_heads} is not a multiple of "
                f"model.num_kv_heads={self.num_kv_heads}"
            )
        sparse = [self.moe.at(layer) for layer in self.moe.moe_layers(self.num_layers)]
        leaks = any(moe.router.experts_choose for moe in sparse)
        if leaks and not self.moe.allow_future_leak:
            raise ConfigError(
                "expert choice in a causal decoder routes a token by later ones; set "
                "model.moe.allow_future_leak=True if that is what you want to measure"
            )

    def blocks(self) -> list[BlockConfig]:
        """Returns the configuration of every layer in order."""
        attention = AttentionConfig(
            width=self.width,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads or self.num_heads,
            head_dim=self.head_dim,
            rotary=self.positions == "rotary",
            init_scale=self.init_scale,
        )
        feed_forward = FeedForwardConfig(
            self.width, self.mlp_dim, self.activation, self.gated, self.init_scale
        )
        sparse = self.moe.moe_layers(self.num_layers)

        def block(layer: int) -> BlockConfig:
            moe = self.moe.at(layer) if layer in sparse else None
            hidden = moe.expert_dim if moe else self.mlp_dim
            inner = dataclasses.replace(feed_forward, hidden=hidden)
            return BlockConfig(attention, inner, moe, self.dropout, self.norm_eps, feed_forward)

        return [block(layer) for layer in range(self.num_layers)]


class Decoder(nnx.Module):
    """Embedding, layers, final norm and head."""

    def __init__(self, config: DecoderConfig, vocab_size: int, key: Array):
        """Makes the model; ``key`` determines every parameter, on any mesh."""
        keys = jax.random.split(key, 4)
        width = config.width
        # Unit variance at the head, so tied logits start near unit scale.
        self.embedding = weight(
            keys[0], (vocab_size, width), ("vocab", "embed"), fan_in=width, scale=1.0
        )
        self.layers = Stack(config.blocks(), keys[1], scan=config.scan_layers, remat=config.remat)
        self.final_norm = RMSNorm(width, config.norm_eps)
        if not config.tie_embeddings:
            self.head = weight(
                keys[2], (width, vocab_size), ("embed", "vocab"), fan_in=width, scale=1.0
            )
        if config.positions == "t5_relative":
            self.relative_bias = RelativeBias(config.num_heads, keys[3])
        self.config = config

    def hidden(
        self,
        inputs: Array,
        segments: Array,
        positions: Array,
        *,
        mode: Mode = EVAL,
        rng: Array | None = None,
        records: Sequence[Array] | None = None,
    ) -> tuple[Array, tuple[MoEAux, ...]]:
        """Runs everything but the head.

        Args:
            inputs: ``(B, L)`` int32 token ids.
            segments: ``(B, L)`` int32; attention stays within equal ones, 0 is padding.
            positions: ``(B, L)`` int32.
            mode: see ``Mode``.
            rng: key of everything random in training; without it the pass is deterministic.
            records: the routing to force, ``(B, L, K)`` per MoE layer in order.

        Returns:
            ``(B, L, M)`` and one report per MoE layer.
        """
        dtype = jnp.dtype(self.config.compute_dtype)
        x = self.embedding[...].astype(dtype)[inputs] * jnp.sqrt(self.config.width).astype(dtype)
        bias = causal_bias(segments)
        if self.config.positions == "t5_relative":
            bias = bias + self.relative_bias(inputs.shape[1])
        context = Context(bias, positions, segments > 0, inputs)
        x, reports = self.layers(
            constrain(x, "batch"), context, mode=mode, rng=rng, records=records
        )
        return self.final_norm(x), reports

    def logits(self, hidden: Array) -> Array:
        """Returns float32 logits ``(B, L, V)`` for ``hidden (B, L, M)``."""
        dtype = hidden.dtype
        if self.config.tie_embeddings:
            logits = jnp.einsum("blm,vm->blv", hidden, self.embedding[...].astype(dtype))
        else:
            logits = jnp.einsum("blm,mv->blv", hidden, self.head[...].astype(dtype))
        return constrain(logits.astype(jnp.float32), "batch", "length", "vocab")
