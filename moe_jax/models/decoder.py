"""Decoder-only language model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.models.cache import Cache, causal_view
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
from moe_jax.ranges import LayerIndex, Layers

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class DecoderConfig(ModelConfig):
    """A decoder-only transformer.

    Attributes:
        num_layers: dense and MoE layers together.
        moe: the mixture-of-experts layers.
        lookahead: modules that each predict one more token ahead, in training alone, with a layer
            like the last one (DeepSeek-V3, 2412.19437, section 2.2).
    """

    num_layers: Layers = 4
    moe: MoEConfig = MoEConfig()
    lookahead: LayerIndex = 0

    def __post_init__(self):
        super().__post_init__()
        self._refuse_leaks()

    def sparse_layers(self) -> tuple[SparseLayer, ...]:
        """Returns the layers with experts; those of the modules that look ahead come last."""
        found = super().sparse_layers()
        last = [layer for layer in found if layer.index == self.num_layers - 1]
        later = range(self.num_layers, self.num_layers + self.lookahead)
        return found + tuple(
            dataclasses.replace(layer, index=index) for index in later for layer in last
        )

    def _stacks(self) -> tuple[tuple[str, MoEConfig, int], ...]:
        return (("moe", self.moe, self.num_layers),)

    def layers(self) -> list[BlockConfig]:
        """Returns the configuration of every layer in order."""
        return self.blocks(self.num_layers, self.moe)


class Decoder(nnx.Module):
    """Embedding, layers, final norm and head."""

    def __init__(self, config: DecoderConfig, vocab_size: int, key: Array):
        """Makes the model; ``key`` determines every parameter, on any mesh."""
        keys = jax.random.split(key, 4)
        self.embedding = Embedding(config, vocab_size, keys[0], keys[2])
        options = {"scan": config.scan_layers, "remat": config.remat}
        self.layers = Stack(config.layers(), keys[1], **options)
        self.final_norm = norm(config.norm, config.width)
        self.relative_bias = relative_bias(config, keys[3], both_ways=False)
        if config.lookahead:
            further = jax.random.split(jax.random.fold_in(key, 1), config.lookahead)
            self.lookahead = nnx.List(Lookahead(config, config.layers()[-1], k) for k in further)
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
        view = causal_view(segments, positions, self.relative_bias, None)
        context = Context(view, valid_tokens(segments), inputs)
        x = self.embedding(inputs, positions)
        x, reports, _ = self.layers(x, context, mode=mode, rng=rng, records=records)
        return self.final_norm(x), reports

    def read(
        self, batch: Mapping[str, Any], *, mode: Mode = EVAL, rng: Array | None = None
    ) -> Reading:
        """Runs a batch of ``moe_jax.data``, and looks ahead; ``routing`` in it is forced."""
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
        view = causal_view(segments, positions, self.relative_bias, None)
        found, x = [], hidden
        for step, module in enumerate(self._further):
            tokens = ahead(batch["targets"], step)
            context = Context(view, valid_ahead(segments, step), tokens)
            x, for_head, more = module(
                x,
                self.embedding(tokens, positions),
                context,
                mode=mode,
                rng=None if rng is None else jax.random.fold_in(rng, step),
                records=None if routing is None else routing[self._places(step)],
            )
            found.append(for_head)
            reports += more
        return Reading(hidden, reports, tuple(found))

    def routed(self, batch: Mapping[str, Any]) -> tuple[tuple[Array, Array], ...]:
        """Returns tokens and ``valid`` of every MoE layer, each ``(B, L)``, in order."""
        segments = batch["segments"]
        found = ((batch["inputs"], valid_tokens(segments)),) * self.layers.num_sparse
        for step, module in enumerate(self._further):
            tokens = ahead(batch["targets"], step), valid_ahead(segments, step)
            found += (tokens,) * module.layers.num_sparse
        return found

    def update_routers(self, demands: Sequence[Array]) -> None:
        """Moves the state of all routers on by one optimizer step; see ``Stack``."""
        sparse = self.layers.num_sparse
        self.layers.update_routers(demands[:sparse])
        for step, module in enumerate(self._further):
            module.layers.update_routers(demands[self._places(step)])

    def _places(self, step: int) -> slice:
        """Where the values of a module that looks ahead are, among those of all MoE layers."""
        each = self.lookahead[step].layers.num_sparse
        start = self.layers.num_sparse + step * each
        return slice(start, start + each)

    @property
    def _further(self) -> Sequence[Lookahead]:
        return self.lookahead if self.config.lookahead else ()

    def extend(
        self, inputs: Array, segments: Array, positions: Array, cache: Cache, *, mode: Mode = DECODE
    ) -> tuple[Array, Cache]:
        """Reads tokens that follow those of ``cache``.

        Args:
            inputs: ``(B, L)`` int32.
            segments: ``(B, L)`` int32, 0 for the padding in front of a short prompt.
            positions: ``(B, L)`` int32.
            cache: as from ``empty_cache``.
            mode: see ``Mode``; by default routing never depends on the other rows.

        Returns:
            ``(B, L, M)`` and the cache with these tokens.
        """
        cache = cache.extended(segments, positions)
        view = causal_view(segments, positions, self.relative_bias, cache)
        context = Context(view, valid_tokens(segments), inputs)
        x = self.embedding(inputs, positions)
        x, _, layers = self.layers(x, context, mode=mode, rng=None, cache=cache.layers)
        return self.final_norm(x), dataclasses.replace(cache, layers=layers)

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """Returns a cache for ``batch`` rows of up to ``slots`` tokens, prompt included."""
        dtype = jnp.dtype(self.config.compute_dtype)
        return Cache.empty(self.layers.empty_cache(batch, slots, dtype), batch, slots)

    def logits(self, hidden: Array) -> Array:
        """Returns float32 logits ``(B, L, V)`` for ``hidden (B, L, M)``."""
        return self.embedding.logits(hidden)
