"""The bytes that a decode step reads, and the FLOPs of the model in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
from flax import nnx

from moe_jax.counting.count import count
from moe_jax.models import Decoder
from moe_jax.models.stack import StackCache
from moe_jax.nn.attention import AttentionConfig
from moe_jax.nn.latent import LatentConfig
from moe_jax.nn.moe import ConfiguredMoE
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.parallel.mesh import MeshConfig, batch_shards
from moe_jax.planning.compile import device_bytes


@dataclasses.dataclass(frozen=True)
class Decoding:
    """The requests of one decode step.

    Attributes:
        batch: Number ``B`` of requests, each of which reads one token.
        context: Number ``T`` of tokens that this token attends to, itself included.
        page: Number of entries per page of the cache.
    """

    batch: int = 64
    context: int = 2048
    page: int = 16

    @property
    def pages(self) -> int:
        """Number of pages per request."""
        return -(-self.context // self.page)

    @property
    def entries(self) -> int:
        """Number of entries of the cache of an engine, with the page that padding writes."""
        return (1 + self.batch * self.pages) * self.page


@dataclasses.dataclass(frozen=True)
class Reads:
    """Bytes that a device reads in a decode step, on average over the devices.

    Attributes:
        dense: Bytes of the parameters that process every token; of an embedding without head, the
            rows of the tokens.
        experts: Bytes of the experts that the tokens of the batch choose, in expectation; see
            ``touched``.
        cache: Bytes of the entries that the tokens attend to.
    """

    dense: int
    experts: int
    cache: int


def touched(moe: MoEConfig, batch: int) -> float:
    """Returns the expected share of a layer's experts that a batch of tokens chooses.

    Each token chooses ``K`` of ``E`` experts, all sets alike and independently of other tokens, so
    an expert is left out by all ``B`` tokens with probability ``(1 - K / E) ** B``.

    Args:
        moe: Configuration of the layer.
        batch: Number ``B`` of tokens.
    """
    chosen = moe.router.experts_per_token(batch, moe.num_experts) / moe.num_experts
    return 1.0 - max(1.0 - chosen, 0.0) ** batch


def reads(model: Decoder, pages: StackCache, decoding: Decoding, mesh: MeshConfig) -> Reads:
    """Returns the bytes that a device reads in a step.

    Parameters of the lookahead modules are not read. A device reads its own shard of a parameter;
    the mesh splits the requests if its shards of the batch divide them.

    Args:
        model: Model of arrays, or of shapes with shardings.
        pages: Pages of all layers, or their shapes with shardings.
        decoding: The requests.
        mesh: Sizes of the mesh.
    """
    experts, of_experts = 0.0, 0
    for mixture in _mixtures(model):
        held = device_bytes(jax.tree.leaves(mixture.experts))
        of_experts += held
        experts += held * touched(mixture.config, decoding.batch)
    parts = (model.embedding, model.layers, model.final_norm, model.relative_bias)
    dense = device_bytes(jax.tree.leaves(parts)) - of_experts
    if not model.config.tie_embeddings:
        # The mesh splits the table by width or by vocabulary; each device reads its share of a row.
        table = model.embedding.table
        bytes_per_row = device_bytes(jax.tree.leaves(table)) / table.shape[0]
        dense -= round(bytes_per_row * (table.shape[0] - min(decoding.batch, table.shape[0])))
    shards = batch_shards(mesh)
    rows = decoding.batch // shards if decoding.batch % shards == 0 else decoding.batch
    return Reads(dense, round(experts), rows * _context_bytes(model, pages, decoding))


def _mixtures(model: Decoder) -> Iterator[ConfiguredMoE]:
    """Yields the MoE layers of the stack; those that a scan repeats have stacked parameters."""
    for _, module in nnx.iter_modules(model.layers):
        if isinstance(module, ConfiguredMoE):
            yield module


def _context_bytes(model: Decoder, pages: StackCache, decoding: Decoding) -> int:
    """Returns the bytes per device of the entries that one token attends to, in all layers."""
    total = 0
    for layer in model.layers.layers():
        _, part, place = layer.path
        one = pages[int(part)][int(place)]
        entry = device_bytes(one) // (model.layers.repeats[int(part)] * decoding.entries)
        total += entry * _reached(layer.block.config.attention, decoding.context)
    return total


def _reached(attention: AttentionConfig | LatentConfig, context: int) -> int:
    """Returns the number of entries that a token attends to, itself included."""
    if isinstance(attention, LatentConfig):
        return context
    return min(context, attention.details.window or attention.details.chunk or context)


def model_flops(model: Decoder, decoding: Decoding) -> float:
    """Returns the FLOPs of the model in a step on all devices, two per multiply-add.

    Args:
        model: Model of arrays or of shapes.
        decoding: The requests.
    """
    cost = count(model.config, model.embedding.table.shape[0], decoding.context)
    attentions = [layer.block.config.attention for layer in model.layers.layers()]
    scores = sum(2 * one.score_dims * _reached(one, decoding.context) for one in attentions)
    return decoding.batch * (cost.flops_per_token - cost.score_flops + scores)
