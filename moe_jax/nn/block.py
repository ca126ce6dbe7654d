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
        dropout: of both residual branches in training.
        norm_eps: of RMSNorm.
    """

    attention: AttentionConfig
    feed_forward: FeedForwardConfig
    moe: MoEConfig | None
    dropout: float
    norm_eps: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer of one forward pass shares.

    Attributes:
        bias: attention bias ``(B or 1, H or 1, L, L)``.
        positions: ``(B, L)`` int32.
        valid: ``(B, L)`` bool, False for padding.
    """

    bias: Array
    positions: Array
    valid: Array


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
        self.config = config

    def __call__(
        self, x: Array, context: Context, *, mode: Mode, rng: Array | None
    ) -> tuple[Array, MoEAux | None]:
        """Maps ``x (B, L, M)`` to ``(B, L, M)``; the report is ``None`` for a dense layer."""
        keys = (None,) * 3 if rng is None else jax.random.split(rng, 3)
        rate = self.config.dropout
        mixed = self.attention(self.attention_norm(x), context.bias, context.positions)
        x = constrain(x + dropout(mixed, rate, keys[0]), "batch")
        inputs = self.feed_forward_norm(x)
        aux = None
        if self.config.moe is None:
            done = self.feed_forward(inputs)
        else:
            done, aux = self.feed_forward(inputs, context.valid, mode=mode, rng=keys[1])
        return constrain(x + dropout(done, rate, keys[2]), "batch"), aux
