"""A model whose head and attention have their weights by rows, for few tokens on one CPU.

A product of few tokens is faster with the matrix as its left factor, and such a matrix has its
outputs first.
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moe_jax.grouped import product_by_rows
from moe_jax.models import Decoder
from moe_jax.models.embedding import Embedding
from moe_jax.models.lookahead import Lookahead
from moe_jax.nn.attention import Attention
from moe_jax.nn.positions import Learned
from moe_jax.precision import wide_einsum

# Smaller products take little time, and copies of more bytes too much memory.
_SMALLEST, _MOST_BYTES = 2**16, 2**28
_MAPS = ("query", "key", "value", "output_gate")
Layered = TypeVar("Layered", Decoder, Lookahead)


class RowEmbedding(Embedding):
    """An embedding whose head has a row per token, as the left factor of the logits."""

    def __init__(self, own: Embedding):
        """Copies the head of ``own`` unless it is the table, and shares all else."""
        self.config, self.table = own.config, own.table
        if isinstance(own.config.positions, Learned):
            self.places = own.places
        if not own.config.tie_embeddings:
            self.rows = nnx.Param(own.head[...].T)

    def products(self, hidden: Float[Array, "B L M"]) -> Float[Array, "B L V"]:
        """Returns the float32 products of ``hidden (B, L, M)`` and the head."""
        rows = self.table if self.config.tie_embeddings else self.rows
        y = wide_einsum("vm,blm->vbl", rows[...].astype(hidden.dtype), hidden)
        # Without the barrier XLA would exchange the factors again.
        return jnp.moveaxis(jax.lax.optimization_barrier(y), 0, -1)


class RowAttention(Attention):
    """Attention whose maps have a row per output."""

    def __init__(self, own: Attention):
        """Copies the maps of ``own`` as ``query (H D, M)`` and so on, and shares all else."""
        for name, part in vars(own).items():
            if isinstance(part, nnx.Variable) or name == "config":
                setattr(self, name, part)
        for name in _MAPS:
            if hasattr(own, name):
                weight = getattr(own, name)[...]
                setattr(self, name, nnx.Param(weight.reshape(len(weight), -1).T))
        output = own.output[...]
        self.output = nnx.Param(output.reshape(-1, output.shape[-1]).T)

    def _mapped(self, x: Float[Array, "B L M"], name: str) -> Float[Array, "B H L D"]:
        y = _product(getattr(self, name), x)
        return y.reshape(*x.shape[:2], -1, self.config.head_dim).swapaxes(1, 2)

    def _output(self, mixed: Float[Array, "B H L D"]) -> Float[Array, "B L M"]:
        batch, heads, length, depth = mixed.shape
        return _product(self.output, mixed.swapaxes(1, 2).reshape(batch, length, heads * depth))


def by_rows(model: Layered, smallest: int = _SMALLEST, most_bytes: int = _MOST_BYTES) -> Layered:
    """Returns a model with the same outputs, which is fast for few tokens on one CPU.

    The head has its weights by rows, and so has the attention of layers that are not stacked.

    Args:
        model: Model; it stays as it is, and shares all other arrays.
        smallest: Number of entries of the map of queries from which attention is changed.
        most_bytes: Largest number of bytes of all maps of queries for which attention is changed.
    """
    if not on_one_cpu():
        return model
    model = jax.tree.map(lambda leaf: leaf, model)
    if isinstance(model, Decoder):
        model.embedding = RowEmbedding(model.embedding)
    found = [
        (block, own)
        for blocks, repeats in zip(model.layers.parts, model.layers.repeats, strict=True)
        for block in blocks
        for own in (block.attention,)
        if repeats == 1 and type(own) is Attention and own.query[...].size >= smallest
    ]
    if sum(own.query[...].nbytes for _, own in found) <= most_bytes:
        for block, own in found:
            block.attention = RowAttention(own)
    return model


def on_one_cpu() -> bool:
    """Returns True if programs run on one device, a CPU."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() == "cpu" and (mesh.empty or mesh.size == 1)


def _product(rows: nnx.Param, x: Float[Array, "B L M"]) -> Float[Array, "B L N"]:
    y = product_by_rows(rows[...].astype(x.dtype), x.reshape(-1, x.shape[-1]))
    return y.reshape(*x.shape[:2], -1)
