"""Decoder-only language model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from moe_jax.errors import ConfigError
from moe_jax.models.cache import Cache, PagedCache, cached_view, own_view
from moe_jax.models.config import ModelConfig, Reading, SparseLayer
from moe_jax.models.embedding import Embedding, relative_bias
from moe_jax.models.lookahead import Lookahead, ahead, valid_ahead
from moe_jax.models.stack import Stack
from moe_jax.nn.block import BlockConfig, Context
from moe_jax.nn.mode import DECODE, EVAL, Mode
from moe_jax.nn.moe import MoEAux
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.norm import norm
from moe_jax.nn.padding import valid_tokens
from moe_jax.nn.router import RouterLayer
from moe_jax.ranges import LayerIndex, Layers
from moe_jax.routing import Counts

_Value = TypeVar("_Value")
_Cache = TypeVar("_Cache", Cache, PagedCache)

NOT_CAUSAL = "a model with model.causal=False predicts masked tokens and generates no text"


@dataclasses.dataclass(frozen=True)
class DecoderConfig(ModelConfig):
    """A decoder-only transformer.

    Attributes:
        num_layers: Number of dense and MoE layers together.
        moe: Settings of the mixture-of-experts layers.
        lookahead: Number of multi-token prediction modules, each for one token further ahead, which
            training and drafts use. A module has one layer, configured as the last layer of the
            model (DeepSeek-V3, 2412.19437, section 2.2).
        causal: True if a token attends to no later token. False makes an encoder, which predicts
            masked tokens (``data.mask_rate``) and generates nothing; experts may choose its tokens.
    """

    num_layers: Layers = 4
    moe: MoEConfig = MoEConfig()
    lookahead: LayerIndex = 0
    causal: bool = True

    def __post_init__(self):
        super().__post_init__()
        self._check_carried()
        if self.causal:
            self._refuse_leaks()
        elif self.lookahead:
            raise ConfigError(
                f"model.lookahead={self.lookahead} predicts later tokens, which a model with "
                "model.causal=False reads: set one of the two to its default"
            )

    def sparse_layers(self) -> tuple[SparseLayer, ...]:
        """Returns the layers with experts; the layers of lookahead modules come last."""
        layers = super().sparse_layers()
        last = [layer for layer in layers if layer.index == self.num_layers - 1]
        later = range(self.num_layers, self.num_layers + self.lookahead)
        return layers + tuple(
            dataclasses.replace(layer, index=index) for index in later for layer in last
        )

    def _stacks(self) -> tuple[tuple[str, MoEConfig, int], ...]:
        return (("moe", self.moe, self.num_layers),)

    def layers(self) -> list[BlockConfig]:
        """Returns the configuration of every layer in order."""
        return self.blocks(self.num_layers, self.moe)


class Decoder(nnx.Module):
    """A decoder-only transformer: embedding, layers, final norm and head."""

    def __init__(self, config: DecoderConfig, vocab_size: int, key: PRNGKeyArray):
        """Initialises the model; ``key`` determines every parameter, on any mesh."""
        keys = jax.random.split(key, 4)
        self.embedding = Embedding(config, vocab_size, keys[0], keys[2])
        self.layers = Stack(config.layers(), keys[1], scan=config.scan_layers, remat=config.remat)
        self.final_norm = norm(config.norm, config.width)
        self.relative_bias = relative_bias(config, keys[3], both_ways=not config.causal)
        if config.lookahead:
            further = jax.random.split(jax.random.fold_in(key, 1), config.lookahead)
            self.lookahead = nnx.List(Lookahead(config, config.layers()[-1], k) for k in further)
        self.config = config

    def hidden(
        self,
        inputs: Int[Array, "B L"],
        segments: Int[Array, "B L"],
        positions: Int[Array, "B L"],
        *,
        mode: Mode = EVAL,
        rng: PRNGKeyArray | None = None,
        records: Sequence[Int[Array, "B L _"]] | None = None,
    ) -> tuple[Float[Array, "B L M"], tuple[MoEAux, ...]]:
        """Returns the hidden states that the head reads.

        Args:
            inputs: Token ids ``(B, L)`` int32.
            segments: Segments ``(B, L)`` int32; attention stays within a segment, 0 is padding.
            positions: Positions ``(B, L)`` int32.
            mode: Mode of the forward pass; see ``Mode``.
            rng: Key of all randomness in training; without a key the pass is deterministic.
            records: Routing to force, ``(B, L, K)`` per MoE layer in order.

        Returns:
            The hidden states ``(B, L, M)`` and one report per MoE layer.
        """
        view = own_view(segments, positions, self.relative_bias)
        view = dataclasses.replace(view, causal=self.config.causal)
        context = Context(view, valid_tokens(segments), inputs)
        x = self.embedding(inputs, positions)
        x, reports, _ = self.layers(x, context, mode=mode, rng=rng, records=records)
        return self.final_norm(x), reports

    def read(
        self, batch: Mapping[str, Any], *, mode: Mode = EVAL, rng: PRNGKeyArray | None = None
    ) -> Reading:
        """Returns the hidden states for a batch of ``moe_jax.data``, lookahead included.

        The field ``routing`` of the batch is forced on the routers.
        """
        segments, positions = batch["segments"], batch["positions"]
        routing = batch.get("routing")
        sparse = self.layers.num_sparse
        hidden, reports = self.hidden(
            batch["inputs"],
            segments,
            positions,
            mode=mode,
            rng=rng,
            records=None if routing is None else routing[:sparse],
        )
        view = own_view(segments, positions, self.relative_bias)
        states, x = [], hidden
        for step, module in enumerate(self._further):
            tokens = ahead(batch["targets"], step)
            context = Context(view, valid_ahead(segments, step), tokens)
            x, for_head, more = module(
                x,
                self.embedding(tokens, positions),
                context,
                mode=mode,
                rng=None if rng is None else jax.random.fold_in(rng, step),
                records=None if routing is None else routing[self._slice_of(step)],
            )
            states.append(for_head)
            reports += more
        return Reading(hidden, reports, tuple(states))

    def routed(
        self, batch: Mapping[str, Any]
    ) -> tuple[tuple[Int[Array, "B L"], Bool[Array, "B L"]], ...]:
        """Returns token ids and ``valid`` of every MoE layer, each ``(B, L)``, in order."""
        segments = batch["segments"]
        tokens = ((batch["inputs"], valid_tokens(segments)),) * self.layers.num_sparse
        for step, module in enumerate(self._further):
            later = ahead(batch["targets"], step), valid_ahead(segments, step)
            tokens += (later,) * module.layers.num_sparse
        return tokens

    def update_routers(self, counts: Sequence[Counts]) -> None:
        """Updates the state of all routers after one optimizer step; see ``Stack``."""
        for stack, own in self._with_stacks(counts):
            stack.update_routers(own)

    def announce_load(self, demands: Sequence[Float[Array, " _"]]) -> None:
        """Makes the choices of a whole batch known to all routers; see ``RouterLayer.announce``."""
        for router, demand in self.with_routers(demands):
            router.announce(demand)

    def with_routers(self, values: Sequence[_Value]) -> Iterator[tuple[RouterLayer, _Value]]:
        """Yields each router with its value; see ``Stack``."""
        for stack, own in self._with_stacks(values):
            yield from stack.with_routers(own)

    def _with_stacks(self, values: Sequence[_Value]) -> list[tuple[Stack, Sequence[_Value]]]:
        further = [
            (module.layers, values[self._slice_of(step)])
            for step, module in enumerate(self._further)
        ]
        return [(self.layers, values[: self.layers.num_sparse]), *further]

    def _slice_of(self, step: int) -> slice:
        """Returns the slice of a lookahead module's MoE layers among all MoE layers."""
        each = self.lookahead[step].layers.num_sparse
        start = self.layers.num_sparse + step * each
        return slice(start, start + each)

    @property
    def _further(self) -> Sequence[Lookahead]:
        return self.lookahead if self.config.lookahead else ()

    def extend(
        self,
        inputs: Int[Array, "B L"],
        segments: Int[Array, "B L"],
        positions: Int[Array, "B L"],
        cache: _Cache,
        *,
        mode: Mode = DECODE,
    ) -> tuple[Float[Array, "B L M"], _Cache]:
        """Returns hidden states of tokens that follow the tokens of ``cache``.

        Args:
            inputs: Token ids ``(B, L)`` int32.
            segments: Segments ``(B, L)`` int32, 0 for the padding in front of a short prompt.
            positions: Positions ``(B, L)`` int32.
            cache: Cache of the tokens before these, as from ``empty_cache``, or pages of entries.
            mode: Mode of the forward pass; by default the routing of a row does not depend on other
                rows.

        Returns:
            The hidden states ``(B, L, M)`` and the cache with these tokens.
        """
        hidden, _, cache = self.extend_reported(inputs, segments, positions, cache, mode=mode)
        return hidden, cache

    def extend_reported(
        self,
        inputs: Int[Array, "B L"],
        segments: Int[Array, "B L"],
        positions: Int[Array, "B L"],
        cache: _Cache,
        *,
        mode: Mode = DECODE,
    ) -> tuple[Float[Array, "B L M"], tuple[MoEAux, ...], _Cache]:
        """Returns what ``extend`` does, and the reports of all MoE layers; see ``extend``."""
        cache = cache.extended(segments, positions)
        view = cached_view(segments, positions, self.relative_bias, cache)
        context = Context(view, valid_tokens(segments), inputs)
        x = self.embedding(inputs, positions)
        x, reports, layers = self.layers(x, context, mode=mode, rng=None, cache=cache.layers)
        assert layers is not None  # A stack that gets a cache returns one.
        return self.final_norm(x), reports, dataclasses.replace(cache, layers=layers)

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """Returns an empty cache for ``batch`` rows of up to ``slots`` tokens, prompts included."""
        if not self.config.causal:
            raise ConfigError(NOT_CAUSAL)
        dtype = jnp.dtype(self.config.compute_dtype)
        return Cache.empty(self.layers.empty_cache(batch, slots, dtype), batch, slots)

    def logits(self, hidden: Float[Array, "B L M"]) -> Float[Array, "B L V"]:
        """Returns float32 logits ``(B, L, V)`` for ``hidden (B, L, M)``."""
        return self.embedding.logits(hidden)
