"""Multi-token prediction: modules that predict tokens further ahead, to train or to draft."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from moe_jax.models.config import ModelConfig
from moe_jax.models.stack import Stack, StackCache
from moe_jax.nn.block import BlockConfig, Context
from moe_jax.nn.init import weight
from moe_jax.nn.mode import DECODE, Mode
from moe_jax.nn.moe import MoEAux
from moe_jax.nn.norm import norm
from moe_jax.nn.padding import valid_tokens


class Lookahead(nnx.Module):
    """A prediction module of DeepSeek-V3 (2412.19437, section 2.2).

    The module shares the model's embedding and head. As in the released weights, the first half of
    ``merge`` reads the token and the second half reads the hidden state.
    """

    def __init__(self, config: ModelConfig, block: BlockConfig, key: PRNGKeyArray):
        """Initialises two norms, the projection ``(2 M, M)``, a layer and the final norm."""
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
        hidden: Float[Array, "B L M"],
        embedded: Float[Array, "B L M"],
        context: Context,
        *,
        mode: Mode,
        rng: PRNGKeyArray | None,
        records: Sequence[Int[Array, "B L _"]] | None = None,
    ) -> tuple[Float[Array, "B L M"], Float[Array, "B L M"], tuple[MoEAux, ...]]:
        """Returns hidden states that have read one more token.

        Args:
            hidden: Hidden states ``(B, L, M)`` of the model or of the module before.
            embedded: Embeddings ``(B, L, M)`` of the next token, which ``hidden`` has not read.
            context: Context of the model's layers.
            mode: Mode of the forward pass; see ``Mode``.
            rng: Key of all randomness in training.
            records: Routing to force, ``(B, L, K)`` per MoE layer.

        Returns:
            The states ``(B, L, M)`` for the next module, the states ``(B, L, M)`` for the head, and
            the reports of the MoE layers.
        """
        x = self._merged(hidden, embedded)
        x, reports, _ = self.layers(x, context, mode=mode, rng=rng, records=records)
        return x, self.final_norm(x), reports

    def extend(
        self,
        hidden: Float[Array, "B L M"],
        embedded: Float[Array, "B L M"],
        context: Context,
        cache: StackCache,
    ) -> tuple[Float[Array, "B L M"], Float[Array, "B L M"], StackCache]:
        """Returns the states of tokens that follow the tokens of ``cache``.

        Args:
            hidden: Hidden states ``(B, L, M)`` of the model or of the module before.
            embedded: Embeddings ``(B, L, M)`` of the next token, which ``hidden`` has not read.
            context: Context of the model's layers, with a view on the cache.
            cache: Keys and values of the module for the tokens before these.

        Returns:
            The states ``(B, L, M)`` for the next module, the states ``(B, L, M)`` for the head, and
            the cache with these tokens.
        """
        x = self._merged(hidden, embedded)
        x, _, extended = self.layers(x, context, mode=DECODE, rng=None, cache=cache)
        assert extended is not None  # A stack that gets a cache returns one.
        return x, self.final_norm(x), extended

    def _merged(
        self, hidden: Float[Array, "B L M"], embedded: Float[Array, "B L M"]
    ) -> Float[Array, "B L M"]:
        both = jnp.concatenate([self.token_norm(embedded), self.hidden_norm(hidden)], axis=-1)
        return both @ self.merge[...].astype(both.dtype)


def ahead(values: Int[Array, "B L"], steps: int) -> Int[Array, "B L"]:
    """Returns for each token the value of the token ``steps`` later, 0 behind the last token."""
    length = values.shape[1]
    return jnp.pad(values, ((0, 0), (0, steps)))[:, steps : steps + length]


def valid_ahead(segments: Int[Array, "B L"], steps: int) -> Bool[Array, "B L"]:
    """Returns True for each token whose segment holds the token ``steps`` later."""
    return valid_tokens(segments) & (ahead(segments, steps) == segments)
