"""Encoder-decoder model in T5's form, each stack with its own mixture-of-experts layers."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.errors import ConfigError
from moe_jax.models.stack import Remat, Stack
from moe_jax.nn.attention import AttentionConfig, RelativeBias, causal_bias, segment_bias
from moe_jax.nn.block import BlockConfig, Context
from moe_jax.nn.feed_forward import Activation, FeedForwardConfig
from moe_jax.nn.init import weight
from moe_jax.nn.mode import EVAL, Mode
from moe_jax.nn.moe import MoEAux, MoEConfig
from moe_jax.nn.norm import RMSNorm
from moe_jax.parallel import constrain

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig:
    """An encoder-decoder transformer with T5's relative positions.

    Attributes:
        encoder_layers: dense and MoE layers of the encoder together.
        decoder_layers: those of the decoder.
        width: ``M``.
        num_heads: ``H``.
        head_dim: ``D``.
        mlp_dim: ``F`` of the dense layers.
        activation: of dense layers and experts.
        gated: gated linear units in dense layers and experts.
        tie_embeddings: the head is the transposed embedding.
        dropout: of residual branches in training.
        init_scale: scale of the truncated normals (Switch section 2.4 uses 0.1).
        norm_eps: of RMSNorm.
        scan_layers: compile repeating layers once.
        remat: what the backward pass recomputes; see ``DecoderConfig``.
        compute_dtype: of activations; parameters, router, norms and softmax stay float32.
        encoder_moe: the MoE layers of the encoder, where experts may choose tokens.
        decoder_moe: those of the decoder, which is causal.
    """

    encoder_layers: int = 4
    decoder_layers: int = 4
    width: int = 128
    num_heads: int = 4
    head_dim: int = 32
    mlp_dim: int = 512
    activation: Activation = "relu"
    gated: bool = False
    tie_embeddings: bool = True
    dropout: float = 0.0
    init_scale: float = 1.0
    norm_eps: float = 1e-6
    scan_layers: bool = True
    remat: Remat = "none"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    encoder_moe: MoEConfig = MoEConfig()
    decoder_moe: MoEConfig = MoEConfig()

    def __post_init__(self):
        for name in ("encoder_layers", "decoder_layers", "width", "num_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name}={getattr(self, name)} must be at least 1")
        self.encoder_moe.moe_layers(self.encoder_layers)
        sparse = self.decoder_moe.moe_layers(self.decoder_layers)
        leaks = any(self.decoder_moe.at(layer).router.experts_choose for layer in sparse)
        if leaks and not self.decoder_moe.allow_future_leak:
            raise ConfigError(
                "expert choice in a causal decoder routes a token by later ones; set "
                "model.decoder_moe.allow_future_leak=True if that is what you want to measure"
            )

    def blocks(self, layers: int, moe: MoEConfig, *, cross: bool) -> list[BlockConfig]:
        """Returns the configuration of every layer of one stack."""
        attention = AttentionConfig(
            width=self.width,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=self.head_dim,
            rotary=False,
            init_scale=self.init_scale,
        )
        dense = FeedForwardConfig(
            self.width, self.mlp_dim, self.activation, self.gated, self.init_scale
        )
        sparse = moe.moe_layers(layers)

        def block(layer: int) -> BlockConfig:
            mixture = moe.at(layer) if layer in sparse else None
            hidden = mixture.expert_dim if mixture else self.mlp_dim
            return BlockConfig(
                attention=attention,
                feed_forward=dataclasses.replace(dense, hidden=hidden),
                moe=mixture,
                dropout=self.dropout,
                norm_eps=self.norm_eps,
                extra=dense,
                cross_attention=attention if cross else None,
            )

        return [block(layer) for layer in range(layers)]


class EncoderDecoder(nnx.Module):
    """Shared embedding, encoder, decoder and head."""

    def __init__(self, config: EncoderDecoderConfig, vocab_size: int, key: Array):
        """Makes the model; ``key`` determines every parameter, on any mesh."""
        keys = jax.random.split(key, 6)
        width, options = config.width, {"scan": config.scan_layers, "remat": config.remat}
        self.embedding = weight(
            keys[0], (vocab_size, width), ("vocab", "embed"), fan_in=width, scale=1.0
        )
        encoder = config.blocks(config.encoder_layers, config.encoder_moe, cross=False)
        decoder = config.blocks(config.decoder_layers, config.decoder_moe, cross=True)
        self.encoder = Stack(encoder, keys[1], **options)
        self.decoder = Stack(decoder, keys[2], **options)
        self.encoder_norm = RMSNorm(width, config.norm_eps)
        self.final_norm = RMSNorm(width, config.norm_eps)
        self.encoder_bias = RelativeBias(config.num_heads, keys[3], both_ways=True)
        self.decoder_bias = RelativeBias(config.num_heads, keys[4])
        if not config.tie_embeddings:
            self.head = weight(
                keys[5], (width, vocab_size), ("embed", "vocab"), fan_in=width, scale=1.0
            )
        self.config = config

    def encode(
        self, tokens: Array, segments: Array, *, mode: Mode = EVAL, rng: Array | None = None
    ) -> tuple[Array, tuple[MoEAux, ...]]:
        """Returns ``(B, T, M)`` and the reports of the encoder's MoE layers.

        Args:
            tokens: ``(B, T)`` int32.
            segments: ``(B, T)`` int32; attention stays within equal ones, 0 is padding.
            mode: see ``Mode``.
            rng: key of everything random in training.
        """
        bias = segment_bias(segments, segments) + self.encoder_bias(tokens.shape[1])
        context = Context(bias, jnp.zeros_like(tokens), segments > 0, tokens)
        x, reports = self.encoder(self._embed(tokens), context, mode=mode, rng=rng)
        return self.encoder_norm(x), reports

    def decode(
        self,
        tokens: Array,
        segments: Array,
        memory: Array,
        memory_segments: Array,
        *,
        mode: Mode = EVAL,
        rng: Array | None = None,
    ) -> tuple[Array, tuple[MoEAux, ...]]:
        """Returns ``(B, L, M)`` and the reports of the decoder's MoE layers.

        Args:
            tokens: ``(B, L)`` int32, the targets moved right by one.
            segments: ``(B, L)`` int32.
            memory: ``(B, T, M)`` from ``encode``.
            memory_segments: ``(B, T)`` int32; a segment attends to the equal one.
            mode: see ``Mode``.
            rng: key of everything random in training.
        """
        bias = causal_bias(segments) + self.decoder_bias(tokens.shape[1])
        across = segment_bias(segments, memory_segments)
        context = Context(bias, jnp.zeros_like(tokens), segments > 0, tokens, memory, across)
        x, reports = self.decoder(self._embed(tokens), context, mode=mode, rng=rng)
        return self.final_norm(x), reports

    def logits(self, hidden: Array) -> Array:
        """Returns float32 logits ``(B, L, V)`` for ``hidden (B, L, M)``.

        T5 draws its embedding with deviation 1 and divides by ``sqrt(M)`` at the tied head; here it
        is drawn that much smaller and multiplied by ``sqrt(M)`` at the input.
        """
        if self.config.tie_embeddings:
            kernel = self.embedding[...].astype(hidden.dtype).T
        else:
            kernel = self.head[...].astype(hidden.dtype)
        logits = jnp.einsum("blm,mv->blv", hidden, kernel)
        return constrain(logits.astype(jnp.float32), "batch", "length", "vocab")

    def _embed(self, tokens: Array) -> Array:
        dtype = jnp.dtype(self.config.compute_dtype)
        scale = jnp.sqrt(self.config.width).astype(dtype)
        return constrain(self.embedding[...].astype(dtype)[tokens] * scale, "batch")
