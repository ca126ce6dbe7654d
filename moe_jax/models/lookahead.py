"""Multi-token prediction: modules that guess tokens further ahead, to train a model better."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.models.config import ModelConfig
from moe_jax.models.stack import Stack
from moe_jax.nn.block import BlockConfig, Context
from moe_jax.nn.init import weight
from moe_jax.nn.mode import Mode
from moe_jax.nn.moe import MoEAux
from moe_jax.nn.norm import norm
from moe_jax.nn.padding import valid_tokens

Array = jax.Array


class Lookahead(nnx.Module):
    """One module of DeepSeek-V3 (2412.19437, section 2.2), which shares embedding and head.

    The released weights read the token's half of ``merge`` first.
    """

    def __init__(self, config: ModelConfig, block: BlockConfig, key: Array):
        """Makes two norms, the projection ``(2 M, M)``, a layer and the norm before the head."""
        keys = jax.random.split(key, 2)
        width = config.width
        self.token_norm = norm(config.norm, width)
        self.hidden_norm = norm(config.norm, width)
        self.merge = weight(
            keys[0],
            (2 * width, width),
            (None, "embed"),
            fan_in=2 * width,
            scale=config.init_scale,
        )
        self.layers = Stack([block], keys[1], scan=config.scan_layers, remat=config.remat)
        self.final_norm = norm(config.norm, width)

    def __call__(
        self,
        hidden: Array,
        embedded: Array,
        context: Context,
        *,
        mode: Mode,
        rng: Array | None,
        records: tuple[Array, ...] | None = None,
    ) -> tuple[Array, Array, tuple[MoEAux, ...]]:
        """Reads one more token.

        Args:
            hidden: ``(B, L, M)``, of the model or of the module before.
            embedded: ``(B, L, M)``, the next token that those do not know.
            context: of the model's layers.
            mode: see ``Mode``.
            rng: key of everything random in training.
            records: the routing to force.

        Returns:
            ``(B, L, M)`` for the module after, the same for the head, and the layer's report.
        """
        both = jnp.concatenate([self.token_norm(embedded), self.hidden_norm(hidden)], axis=-1)
        x = both @ self.merge[...].astype(both.dtype)
        x, reports, _ = self.layers(x, context, mode=mode, rng=rng, records=records)
        return x, self.final_norm(x), reports


def ahead(values: Array, steps: int) -> Array:
    """Returns ``values (B, L)`` of ``steps`` tokens later, zeros after the last."""
    length = values.shape[1]
    return jnp.pad(values, ((0, 0), (0, steps)))[:, steps : steps + length]


def valid_ahead(segments: Array, steps: int) -> Array:
    """Returns ``(B, L)`` bool: whether the token ``steps`` later is of the same segment."""
    return valid_tokens(segments) & (ahead(segments, steps) == segments)
