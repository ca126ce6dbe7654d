"""Encoder-decoder model in T5's form, with mixture-of-experts layers in both stacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from moe_jax.attend import View
from moe_jax.errors import ConfigError
from moe_jax.models.cache import Cache, cached_view, own_view
from moe_jax.models.config import ModelConfig, Reading
from moe_jax.models.embedding import Embedding, relative_bias
from moe_jax.models.stack import Stack
from moe_jax.nn.block import Context
from moe_jax.nn.feed_forward import Activation
from moe_jax.nn.mode import DECODE, EVAL, Mode
from moe_jax.nn.moe import MoEAux
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.norm import norm
from moe_jax.nn.padding import valid_tokens
from moe_jax.nn.positions import Positions, Rotary, T5Relative
from moe_jax.nn.router import RouterLayer
from moe_jax.ranges import Layers
from moe_jax.routing import Counts

_Value = TypeVar("_Value")


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig(ModelConfig):
    """An encoder-decoder transformer.

    Attributes:
        encoder_layers: Number of dense and MoE layers of the encoder together.
        decoder_layers: Number of dense and MoE layers of the decoder together.
        encoder_moe: Settings of the encoder's MoE layers, where experts may choose tokens.
        decoder_moe: Settings of the decoder's MoE layers, which are causal.
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
                "rotary positions need common positions of queries and memory, which an "
                "encoder-decoder does not have: set "
                "model.positions.type to T5Relative, Learned or Sinusoidal"
            )
        if isinstance(self.positions, T5Relative) and self.positions.buckets < 4:
            raise ConfigError(
                f"model.positions.buckets={self.positions.buckets}: an encoder needs at least 4, "
                "as half of them are for later tokens"
            )
        self._check_carried()
        self._refuse_leaks()

    def _stacks(self) -> tuple[tuple[str, MoEConfig, int], ...]:
        return (
            ("encoder_moe", self.encoder_moe, self.encoder_layers),
            ("decoder_moe", self.decoder_moe, self.decoder_layers),
        )


class EncoderDecoder(nnx.Module):
    """An encoder-decoder transformer: shared embedding, encoder, decoder and head."""

    def __init__(self, config: EncoderDecoderConfig, vocab_size: int, key: PRNGKeyArray):
        """Initialises the model; ``key`` determines every parameter, on any mesh."""
        keys = jax.random.split(key, 6)
        scan, remat = config.scan_layers, config.remat
        self.embedding = Embedding(config, vocab_size, keys[0], keys[5])
        encoder = config.blocks(config.encoder_layers, config.encoder_moe)
        decoder = config.blocks(config.decoder_layers, config.decoder_moe, cross=True)
        self.encoder = Stack(encoder, keys[1], scan=scan, remat=remat)
        self.decoder = Stack(decoder, keys[2], scan=scan, remat=remat)
        self.encoder_norm = norm(config.norm, config.width)
        self.final_norm = norm(config.norm, config.width)
        self.encoder_bias = relative_bias(config, keys[3], both_ways=True)
        self.decoder_bias = relative_bias(config, keys[4], both_ways=False)
        self.config = config

    def read(
        self, batch: Mapping[str, Any], *, mode: Mode = EVAL, rng: PRNGKeyArray | None = None
    ) -> Reading:
        """Returns the decoder's hidden states for a span-corruption batch of ``moe_jax.data``.

        The reports of the encoder's MoE layers come before the reports of the decoder's. The field
        ``routing`` of the batch is forced on the routers.
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

    def routed(
        self, batch: Mapping[str, Any]
    ) -> tuple[tuple[Int[Array, "B _"], Bool[Array, "B _"]], ...]:
        """Returns token ids and ``valid`` of every MoE layer in order, ``(B, T)`` or ``(B, L)``."""
        inputs = batch["encoder_inputs"], valid_tokens(batch["encoder_segments"])
        targets = batch["inputs"], valid_tokens(batch["segments"])
        return (inputs,) * self.encoder.num_sparse + (targets,) * self.decoder.num_sparse

    def update_routers(self, counts: Sequence[Counts]) -> None:
        """Updates the state of all routers after one optimizer step.

        The counts of the encoder's MoE layers come first; see ``Stack``.
        """
        sparse = self.encoder.num_sparse
        self.encoder.update_routers(counts[:sparse])
        self.decoder.update_routers(counts[sparse:])

    def announce_load(self, demands: Sequence[Float[Array, " _"]]) -> None:
        """Makes the choices of a whole batch known to all routers; see ``RouterLayer.announce``."""
        for router, demand in self.with_routers(demands):
            router.announce(demand)

    def with_routers(self, values: Sequence[_Value]) -> Iterator[tuple[RouterLayer, _Value]]:
        """Yields each router with its value, the encoder's first; see ``Stack``."""
        sparse = self.encoder.num_sparse
        yield from self.encoder.with_routers(values[:sparse])
        yield from self.decoder.with_routers(values[sparse:])

    def encode(
        self,
        tokens: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        mode: Mode = EVAL,
        rng: PRNGKeyArray | None = None,
        records: Sequence[Int[Array, "B T _"]] | None = None,
    ) -> tuple[Float[Array, "B T M"], tuple[MoEAux, ...]]:
        """Returns the memory ``(B, T, M)`` and the reports of the encoder's MoE layers.

        Args:
            tokens: Token ids ``(B, T)`` int32.
            segments: Segments ``(B, T)`` int32; attention stays within a segment, 0 is padding.
            positions: Positions ``(B, T)`` int32; ``None`` for the columns. Relative positions do
                not read them.
            mode: Mode of the forward pass; see ``Mode``.
            rng: Key of all randomness in training.
            records: Routing to force, ``(B, T, K)`` per MoE layer in order.
        """
        positions = _columns(tokens) if positions is None else positions
        relative = None if self.encoder_bias is None else self.encoder_bias.by_distance
        view = View(segments, positions, relative=relative, causal=False)
        context = Context(view, valid_tokens(segments), tokens)
        x = self.embedding(tokens, positions)
        x, reports, _ = self.encoder(x, context, mode=mode, rng=rng, records=records)
        return self.encoder_norm(x), reports

    def decode(
        self,
        tokens: Int[Array, "B L"],
        segments: Int[Array, "B L"],
        memory: Float[Array, "B T M"],
        memory_segments: Int[Array, "B T"],
        *,
        positions: Int[Array, "B L"] | None = None,
        mode: Mode = EVAL,
        rng: PRNGKeyArray | None = None,
        records: Sequence[Int[Array, "B L _"]] | None = None,
    ) -> tuple[Float[Array, "B L M"], tuple[MoEAux, ...]]:
        """Returns hidden states ``(B, L, M)`` and the reports of the decoder's MoE layers.

        Args:
            tokens: Token ids ``(B, L)`` int32: the targets, shifted right by one.
            segments: Segments ``(B, L)`` int32.
            memory: Output ``(B, T, M)`` of ``encode``.
            memory_segments: Segments ``(B, T)`` int32 of the memory; a target attends to the memory
                of its segment.
            positions: Positions ``(B, L)`` int32; ``None`` for the columns.
            mode: Mode of the forward pass; see ``Mode``.
            rng: Key of all randomness in training.
            records: Routing to force, ``(B, L, K)`` per MoE layer in order.
        """
        positions = _columns(tokens) if positions is None else positions
        view = own_view(segments, positions, self.decoder_bias)
        across = View(segments, positions, memory_segments, causal=False)
        context = Context(view, valid_tokens(segments), tokens, memory, across)
        x = self.embedding(tokens, positions)
        x, reports, _ = self.decoder(x, context, mode=mode, rng=rng, records=records)
        return self.final_norm(x), reports

    def extend(
        self,
        tokens: Int[Array, "B L"],
        segments: Int[Array, "B L"],
        positions: Int[Array, "B L"],
        cache: Cache,
        memory_segments: Int[Array, "B T"],
        *,
        memory: Float[Array, "B T M"] | None = None,
        mode: Mode = DECODE,
    ) -> tuple[Float[Array, "B L M"], Cache]:
        """Returns hidden states of target tokens that follow the tokens of ``cache``.

        Args:
            tokens: Token ids ``(B, L)`` int32.
            segments: Segments ``(B, L)`` int32.
            positions: Positions ``(B, L)`` int32.
            cache: Cache of the tokens before these, as from ``empty_cache``; it also holds the keys
                and values of the memory.
            memory_segments: Segments ``(B, T)`` int32 of the memory.
            memory: Output ``(B, T, M)`` of ``encode``, which the first call alone needs.
            mode: Mode of the forward pass; by default the routing of a row does not depend on other
                rows.

        Returns:
            The hidden states ``(B, L, M)`` and the cache with these tokens.
        """
        cache = cache.extended(segments, positions)
        view = cached_view(segments, positions, self.decoder_bias, cache)
        across = View(segments, positions, memory_segments, causal=False)
        context = Context(view, valid_tokens(segments), tokens, memory, across)
        x = self.embedding(tokens, positions)
        x, _, layers = self.decoder(x, context, mode=mode, rng=None, cache=cache.layers)
        assert layers is not None  # A stack that gets a cache returns one.
        return self.final_norm(x), dataclasses.replace(cache, layers=layers)

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """Returns an empty cache for ``batch`` rows of up to ``slots`` target tokens."""
        dtype = jnp.dtype(self.config.compute_dtype)
        return Cache.empty(self.decoder.empty_cache(batch, slots, dtype), batch, slots)

    def logits(self, hidden: Float[Array, "B L M"]) -> Float[Array, "B L V"]:
        """Returns float32 logits ``(B, L, V)`` for ``hidden (B, L, M)``."""
        return self.embedding.logits(hidden)


def _columns(tokens: Int[Array, "B L"]) -> Int[Array, "B L"]:
    return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
