"""One transformer layer."""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx

from moe_jax.nn.attention import Attention, AttentionConfig
from moe_jax.nn.dropout import dropout
from moe_jax.nn.feed_forward import FeedForward, FeedForwardConfig
from moe_jax.nn.mode import Mode
from moe_jax.nn.moe import MoE, MoEAux, MoEConfig
from moe_jax.nn.norm import RMSNorm
from moe_jax.parallel import constrain

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """A layer: attention, then a feed-forward network or a mixture of them.

    Attributes:
        attention: the attention.
        feed_forward: the dense network, or one expert.
        moe: the mixture; ``None`` for a dense layer.
        dropout: of all residual branches in training.
        norm_eps: of RMSNorm.
        extra: the dense sub-layer that ``moe.extra_dense`` puts beside the mixture.
        cross_attention: to the context's memory, after the self-attention; ``None`` for none.
    """

    attention: AttentionConfig
    feed_forward: FeedForwardConfig
    moe: MoEConfig | None
    dropout: float
    norm_eps: float
    extra: FeedForwardConfig | None = None
    cross_attention: AttentionConfig | None = None

    @property
    def extra_dense(self) -> str:
        """Where the extra dense sub-layer sits."""
        return "none" if self.moe is None else self.moe.extra_dense


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer of one forward pass shares.

    Attributes:
        bias: attention bias ``(B or 1, H or 1, L, L)``.
        positions: ``(B, L)`` int32.
        valid: ``(B, L)`` bool, False for padding.
        token_ids: ``(B, L)`` int32, for routers that hash them.
        memory: ``(B, T, M)`` for cross-attention, or ``None``.
        memory_bias: ``(B or 1, 1, L, T)``, or ``None``.
    """

    bias: Array
    positions: Array
    valid: Array
    token_ids: Array
    memory: Array | None = None
    memory_bias: Array | None = None


class Block(nnx.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: BlockConfig, key: Array):
        """Makes the two sub-layers and their norms."""
        attention_key, feed_forward_key = jax.random.split(key)
        width = config.attention.width
        self.attention_norm = RMSNorm(width, config.norm_eps)
        self.attention = Attention(config.attention, attention_key)
        self.feed_forward_norm = RMSNorm(width, config.norm_eps)
        if config.moe is None:
            self.feed_forward = FeedForward(config.feed_forward, feed_forward_key)
        else:
            self.feed_forward = MoE(config.moe, config.feed_forward, feed_forward_key)
        if config.cross_attention is not None:
            self.cross_norm = RMSNorm(width, config.norm_eps)
            self.cross = Attention(config.cross_attention, jax.random.fold_in(key, 3))
        if config.extra_dense != "none":
            self.extra_norm = RMSNorm(width, config.norm_eps)
            self.extra = FeedForward(config.extra, jax.random.fold_in(key, 2))
        self.config = config

    def __call__(
        self,
        x: Array,
        context: Context,
        *,
        mode: Mode,
        rng: Array | None,
        record: Array | None = None,
    ) -> tuple[Array, MoEAux | None]:
        """Maps ``x (B, L, M)`` to ``(B, L, M)``; the report is ``None`` for a dense layer.

        ``record`` is the routing to force upon the mixture, see ``moe_jax.nn.moe.MoE``.
        """
        keys = (None,) * 5 if rng is None else jax.random.split(rng, 5)
        mixed = self.attention(self.attention_norm(x), context.bias, context.positions)
        x = self._add(x, mixed, keys[0])
        if self.config.cross_attention is not None:
            mixed = self.cross(
                self.cross_norm(x), context.memory_bias, context.positions, context.memory
            )
            x = self._add(x, mixed, keys[4])
        if self.config.extra_dense == "before":
            x = self._add(x, self.extra(self.extra_norm(x)), keys[3])
        inputs, aux = self.feed_forward_norm(x), None
        if self.config.moe is None:
            done = self.feed_forward(inputs)
        else:
            done, aux = self.feed_forward(
                inputs,
                context.valid,
                mode=mode,
                rng=keys[1],
                token_ids=context.token_ids,
                record=record,
            )
        x = self._add(x, done, keys[2])
        if self.config.extra_dense == "after":
            x = self._add(x, self.extra(self.extra_norm(x)), keys[3])
        return x, aux

    def _add(self, x: Array, branch: Array, key: Array | None) -> Array:
        return constrain(x + dropout(branch, self.config.dropout, key), "batch")
