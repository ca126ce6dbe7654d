"""Encoder-decoder model in T5's form, each stack with its own mixture-of-experts layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.errors import ConfigError
from moe_jax.models.cache import Cache, causal_view
from moe_jax.models.config import ModelConfig, Reading
from moe_jax.models.embedding import Embedding, relative_bias
from moe_jax.models.stack import Stack
from moe_jax.nn.attention import View, segment_bias
from moe_jax.nn.block import Context
from moe_jax.nn.feed_forward import Activation
from moe_jax.nn.mode import DECODE, EVAL, Mode
from moe_jax.nn.moe import MoEAux
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.norm import norm
from moe_jax.nn.padding import valid_tokens
from moe_jax.nn.positions import Positions, Rotary, T5Relative
from moe_jax.ranges import Layers

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig(ModelConfig):
    """An encoder-decoder transformer.

    Attributes:
        encoder_layers: dense and MoE layers of the encoder together.
        decoder_layers: those of the decoder.
        encoder_moe: the MoE layers of the encoder, where experts may choose tokens.
        decoder_moe: those of the decoder, which is causal.
    """

    activation: Activation = "relu"
    positions: Positions = T5Relative()
    encoder_layers: Layers = 4
    decoder_layers: Layers = 4
    encoder_moe: MoEConfig = MoEConfig()
    decoder_moe: MoEConfig = MoEConfig()

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.positions, Rotary):
            raise ConfigError(
                "queries and a memory have no common positions to rotate by: set "
                "model.positions.type to T5Relative, Learned or Sinusoidal"
            )
        if isinstance(self.positions, T5Relative) and self.positions.buckets < 4:
            raise ConfigError(
                f"model.positions.buckets={self.positions.buckets}: an encoder needs at least 4, "
                "as half of them are for later tokens"
            )
        self._refuse_leaks()

    def _stacks(self) -> tuple[tuple[str, MoEConfig, int], ...]:
        return (
            ("encoder_moe", self.encoder_moe, self.encoder_layers),
            ("decoder_moe", self.decoder_moe, self.decoder_layers),
        )


class EncoderDecoder(nnx.Module):
    """Shared embedding, encoder, decoder and head."""

    def __init__(self, config: EncoderDecoderConfig, vocab_size: int, key: Array):
        """Makes the model; ``key`` determines every parameter, on any mesh."""
        keys = jax.random.split(key, 6)
        options = {"scan": config.scan_layers, "remat": config.remat}
        self.embedding = Embedding(config, vocab_size, keys[0], keys[5])
        encoder = config.blocks(config.encoder_layers, config.encoder_moe)
        decoder = config.blocks(config.decoder_layers, config.decoder_moe, cross=True)
        self.encoder = Stack(encoder, keys[1], **options)
        self.decoder = Stack(decoder, keys[2], **options)
        self.encoder_norm = norm(config.norm, config.width)
        self.final_norm = norm(config.norm, config.width)
        self.encoder_bias = relative_bias(config, keys[3], both_ways=True)
        self.decoder_bias = relative_bias(config, keys[4], both_ways=False)
        self.config = config

    def read(
        self, batch: Mapping[str, Any], *, mode: Mode = EVAL, rng: Array | None = None
    ) -> Reading:
        """Encodes and decodes a batch of ``moe_jax.data`` with spans cut out.

        The reports are of the encoder's MoE layers, and then of the decoder's.
        """
        rngs = (None, None) if rng is None else jax.random.split(rng)
        routing, sparse = batch.get("routing"), self.encoder.num_sparse
        forced = (None, None) if routing is None else (routing[:sparse], routing[sparse:])
        around = batch["encoder_segments"]
        memory, first = self.encode(
            batch["encoder_inputs"], around, mode=mode, rng=rngs[0], records=forced[0]
        )
        hidden, second = self.decode(
            batch["inputs"],
            batch["segments"],
            memory,
            around,
            positions=batch["positions"],
            mode=mode,
            rng=rngs[1],
            records=forced[1],
        )
        return Reading(hidden, (*first, *second))

    def routed(self, batch: Mapping[str, Any]) -> tuple[tuple[Array, Array], ...]:
        """Returns tokens and ``valid`` of every MoE layer, ``(B, T)`` or ``(B, L)``, in order."""
        sources = batch["encoder_inputs"], valid_tokens(batch["encoder_segments"])
        targets = batch["inputs"], valid_tokens(batch["segments"])
        return (sources,) * self.encoder.num_sparse + (targets,) * self.decoder.num_sparse

    def update_routers(self, demands: Sequence[Array]) -> None:
        """Moves the state of all routers on by one optimizer step; the encoder's come first."""
        sparse = self.encoder.num_sparse
        self.encoder.update_routers(demands[:sparse])
        self.decoder.update_routers(demands[sparse:])

    def encode(
        self,
        tokens: Array,
        segments: Array,
        *,
        positions: Array | None = None,
        mode: Mode = EVAL,
        rng: Array | None = None,
        records: Sequence[Array] | None = None,
    ) -> tuple[Array, tuple[MoEAux, ...]]:
        """Returns ``(B, T, M)`` and the reports of the encoder's MoE layers.

        Args:
            tokens: ``(B, T)`` int32.
            segments: ``(B, T)`` int32; attention stays within equal ones, 0 is padding.
            positions: ``(B, T)`` int32; ``None`` for the columns. Not read by relative positions.
            mode: see ``Mode``.
            rng: key of everything random in training.
            records: the routing to force, one array per MoE layer in order.
        """
        positions = _columns(tokens) if positions is None else positions
        bias = segment_bias(segments, segments)
        if self.encoder_bias is not None:
            place = jnp.arange(tokens.shape[1])
            bias = bias + self.encoder_bias(place, place)
        context = Context(View(bias, positions), valid_tokens(segments), tokens)
        x = self.embedding(tokens, positions)
        x, reports, _ = self.encoder(x, context, mode=mode, rng=rng, records=records)
        return self.encoder_norm(x), reports

    def decode(
        self,
        tokens: Array,
        segments: Array,
        memory: Array,
        memory_segments: Array,
        *,
        positions: Array | None = None,
        mode: Mode = EVAL,
        rng: Array | None = None,
        records: Sequence[Array] | None = None,
    ) -> tuple[Array, tuple[MoEAux, ...]]:
        """Returns ``(B, L, M)`` and the reports of the decoder's MoE layers.

        Args:
            tokens: ``(B, L)`` int32, the targets moved right by one.
            segments: ``(B, L)`` int32.
            memory: ``(B, T, M)`` from ``encode``.
            memory_segments: ``(B, T)`` int32; a segment attends to the equal one.
            positions: ``(B, L)`` int32; ``None`` for the columns.
            mode: see ``Mode``.
            rng: key of everything random in training.
            records: the routing to force, one array per MoE layer in order.
        """
        positions = _columns(tokens) if positions is None else positions
        view = causal_view(segments, positions, self.decoder_bias, None)
        across = View(segment_bias(segments, memory_segments), positions)
        context = Context(view, valid_tokens(segments), tokens, memory, across)
        x = self.embedding(tokens, positions)
        x, reports, _ = self.decoder(x, context, mode=mode, rng=rng, records=records)
        return self.final_norm(x), reports

    def extend(
        self,
        tokens: Array,
        segments: Array,
        positions: Array,
        cache: Cache,
        memory_segments: Array,
        *,
        memory: Array | None = None,
        mode: Mode = DECODE,
    ) -> tuple[Array, Cache]:
        """Reads target tokens that follow those of ``cache``.

        Args:
            tokens: ``(B, L)`` int32.
            segments: ``(B, L)`` int32.
            positions: ``(B, L)`` int32.
            cache: as from ``empty_cache``; it holds the keys and values of the memory too.
            memory_segments: ``(B, T)`` int32.
            memory: ``(B, T, M)`` from ``encode``, given once, with the first tokens.
            mode: see ``Mode``; by default routing never depends on the other rows.

        Returns:
            ``(B, L, M)`` and the cache with these tokens.
        """
        cache = cache.extended(segments, positions)
        view = causal_view(segments, positions, self.decoder_bias, cache)
        across = View(segment_bias(segments, memory_segments), positions)
        context = Context(view, valid_tokens(segments), tokens, memory, across)
        x = self.embedding(tokens, positions)
        x, _, layers = self.decoder(x, context, mode=mode, rng=None, cache=cache.layers)
        return self.final_norm(x), dataclasses.replace(cache, layers=layers)

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """Returns a cache for ``batch`` rows of up to ``slots`` target tokens."""
        dtype = jnp.dtype(self.config.compute_dtype)
        return Cache.empty(self.decoder.empty_cache(batch, slots, dtype), batch, slots)

    def logits(self, hidden: Array) -> Array:
        """Returns float32 logits ``(B, L, V)`` for ``hidden (B, L, M)``."""
        return self.embedding.logits(hidden)


def _columns(tokens: Array) -> Array:
    return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
