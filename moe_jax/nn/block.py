"""One transformer layer."""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx

from moe_jax.nn.attention import KV, Attention, AttentionConfig, View
from moe_jax.nn.attention_experts import ProjectedAttention, Projections
from moe_jax.nn.dropout import dropout
from moe_jax.nn.feed_forward import FeedForward, FeedForwardConfig
from moe_jax.nn.latent import LatentAttention, LatentConfig
from moe_jax.nn.mode import Mode
from moe_jax.nn.moe import MoE, MoEAux
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.norm import NormConfig, norm
from moe_jax.nn.router import RouterLayer
from moe_jax.parallel import constrain

Array = jax.Array
LayerCache = dict[str, KV]


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """A layer: attention, then a feed-forward network or a mixture of them.

    Attributes:
        attention: the attention.
        feed_forward: the dense network, or one expert.
        moe: the mixture; ``None`` for a dense layer.
        dropout: of all residual branches in training.
        norm: of every branch's input.
        extra: the dense sub-layer that ``moe.extra_dense`` puts beside the mixture.
        cross_attention: to the context's memory, after the self-attention; ``None`` for none.
        attention_experts: the mixture of the self-attention's projections; ``None`` for none.
    """

    attention: AttentionConfig | LatentConfig
    feed_forward: FeedForwardConfig
    moe: MoEConfig | None = None
    dropout: float = 0.0
    norm: NormConfig = NormConfig()
    extra: FeedForwardConfig | None = None
    cross_attention: AttentionConfig | None = None
    attention_experts: MoEConfig | None = None

    @property
    def mixtures(self) -> tuple[MoEConfig, ...]:
        """Its mixtures in the order in which they report: in attention, instead of the network."""
        return tuple(moe for moe in (self.attention_experts, self.moe) if moe is not None)

    @property
    def extra_dense(self) -> str:
        """Where the extra dense sub-layer sits."""
        return "none" if self.moe is None else self.moe.extra_dense


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer of one forward pass shares.

    Attributes:
        view: what the tokens see of each other, and of a cache's.
        valid: ``(B, L)`` bool, False for padding.
        token_ids: ``(B, L)`` int32, for routers that hash them.
        memory: ``(B, T, M)`` for cross-attention; ``None`` if there is none, or a cache holds it.
        memory_view: what the tokens see of it.
    """

    view: View
    valid: Array
    token_ids: Array
    memory: Array | None = None
    memory_view: View | None = None


class Block(nnx.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: BlockConfig, key: Array):
        """Makes the two sub-layers and their norms."""
        attention_key, feed_forward_key = jax.random.split(key)
        width = config.attention.width
        self.attention_norm = norm(config.norm, width)
        if config.attention_experts is None:
            kind = LatentAttention if isinstance(config.attention, LatentConfig) else Attention
            self.attention = kind(config.attention, attention_key)
        else:
            projections, experts_key = Projections(config.attention), jax.random.fold_in(key, 4)
            self.attention_experts = MoE(config.attention_experts, projections, experts_key)
            self.attention = ProjectedAttention(config.attention, attention_key)
        self.feed_forward_norm = norm(config.norm, width)
        if config.moe is None:
            self.feed_forward = FeedForward(config.feed_forward, feed_forward_key)
        else:
            self.feed_forward = MoE(config.moe, config.feed_forward, feed_forward_key)
        if config.cross_attention is not None:
            self.cross_norm = norm(config.norm, width)
            self.cross = Attention(config.cross_attention, jax.random.fold_in(key, 3))
        if config.extra_dense != "none":
            self.extra_norm = norm(config.norm, width)
            self.extra = FeedForward(config.extra, jax.random.fold_in(key, 2))
        self.config = config

    def __call__(
        self,
        x: Array,
        context: Context,
        *,
        mode: Mode,
        rng: Array | None,
        records: tuple[Array, ...] | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Array, tuple[MoEAux, ...], LayerCache | None]:
        """Maps ``x (B, L, M)`` to ``(B, L, M)``.

        Args:
            x: the tokens.
            context: what all layers share.
            mode: see ``Mode``.
            rng: key of everything random in training.
            records: the routing to force upon each mixture, see ``moe_jax.nn.moe.MoE``.
            cache: keys and values of the tokens before these.

        Returns:
            The output; a report per mixture, none for a dense layer; and the cache with the keys
            and values of these tokens, ``None`` if none was given.
        """
        keys = (None,) * 5 if rng is None else jax.random.split(rng, 5)
        sources, reports = self._sources(x, context, mode, rng, records)
        mixed, cache = self._attend(sources, context.view, cache)
        x = self._add(x, mixed, keys[0])
        if self.config.cross_attention is not None:
            mixed, cache = self._attend_memory(x, context, cache)
            x = self._add(x, mixed, keys[4])
        if self.config.extra_dense == "before":
            x = self._add(x, self.extra(self.extra_norm(x)), keys[3])
        inputs = self.feed_forward_norm(x)
        if self.config.moe is None:
            done = self.feed_forward(inputs)
        else:
            done, aux = self.feed_forward(
                inputs,
                context.valid,
                mode=mode,
                rng=keys[1],
                token_ids=context.token_ids,
                record=None if records is None else records[-1],
            )
            reports += (aux,)
        x = self._add(x, done, keys[2])
        if self.config.extra_dense == "after":
            x = self._add(x, self.extra(self.extra_norm(x)), keys[3])
        return x, reports, cache

    @property
    def source_width(self) -> int:
        """Features of what the attention projects, or of what experts have projected for it."""
        attention = self.config.attention
        if self.config.attention_experts is None:
            return attention.width
        return Projections(attention).columns

    @property
    def routers(self) -> tuple[RouterLayer, ...]:
        """Of its mixtures, in the order in which they report."""
        layers = (getattr(self, "attention_experts", None), self.feed_forward)
        return tuple(layer.router for layer in layers if isinstance(layer, MoE))

    def _sources(
        self,
        x: Array,
        context: Context,
        mode: Mode,
        rng: Array | None,
        records: tuple[Array, ...] | None,
    ) -> tuple[Array, tuple[MoEAux, ...]]:
        """Returns what the attention reads, ``(B, L, M)`` or projected by experts."""
        x = self.attention_norm(x)
        if self.config.attention_experts is None:
            return x, ()
        x, aux = self.attention_experts(
            x,
            context.valid,
            mode=mode,
            rng=None if rng is None else jax.random.fold_in(rng, 5),
            token_ids=context.token_ids,
            record=None if records is None else records[0],
        )
        return x, (aux,)

    def _attend(
        self, x: Array, view: View, cache: LayerCache | None
    ) -> tuple[Array, LayerCache | None]:
        kv = self.attention.project(x, view.positions)
        if cache is not None:
            kv = jax.tree.map(
                lambda old, new: jax.lax.dynamic_update_slice_in_dim(
                    old, new.astype(old.dtype), view.start, axis=2
                ),
                cache["self"],
                kv,
            )
            cache = {**cache, "self": kv}
        return self.attention(x, view, kv), cache

    def _attend_memory(
        self, x: Array, context: Context, cache: LayerCache | None
    ) -> tuple[Array, LayerCache | None]:
        if context.memory is None:
            kv = cache["cross"]
        else:
            kv = self.cross.project(context.memory, context.memory_view.positions)
        if cache is not None:
            cache = {**cache, "cross": kv}
        return self.cross(self.cross_norm(x), context.memory_view, kv), cache

    def _add(self, x: Array, branch: Array, key: Array | None) -> Array:
        return constrain(x + dropout(branch, self.config.dropout, key), "batch", "length")
