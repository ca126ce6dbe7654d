"""Reads documents through a model and keeps the routing and the loss of every token."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from moe_jax.analysis.contributions import watch
from moe_jax.analysis.forward import Batch, forward, sparse_layers, stacks
from moe_jax.analysis.texts import Text, batches_of, read_by
from moe_jax.models import Model, ModelConfig
from moe_jax.nn.mode import Mode
from moe_jax.nn.moe import ConfiguredMoE, MoEAux
from moe_jax.nn.moe_config import MoEConfig

# Documents and tokens for which the outputs of experts are compared.
_COMPARED_DOCUMENTS, _COMPARED_TOKENS = 16, 128


@dataclasses.dataclass(frozen=True)
class ObservedLayer:
    """The choices of ``N`` tokens in one MoE layer.

    Attributes:
        name: Name of the layer.
        num_experts: Number ``E`` of experts.
        choices: Expert ``(N, K)`` of each choice, ``-1 - expert`` where it was dropped or the
            expert is free; a free expert has an index of at least ``E``, and ``-1 - E - Z`` stands
            where a token makes fewer than ``K`` choices.
        gates: Combine weight ``(N, K)`` of each choice.
        free: Number ``Z`` of free experts.
        experts_choose: True if experts choose tokens. Then ``K`` is ``E``; the experts that took
            a token come first, the largest gate in front, and ``-1 - E`` fills the rest.
    """

    name: str
    num_experts: int
    choices: np.ndarray
    gates: np.ndarray
    free: int = 0
    experts_choose: bool = False

    @property
    def wanted(self) -> np.ndarray:
        """Expert ``(N, K)`` of each choice, before capacity; at least ``E`` for a free expert.

        The number is at least ``E + Z`` where a token makes fewer than ``K`` choices.
        """
        return np.where(self.choices < 0, -1 - self.choices, self.choices)

    @property
    def chosen(self) -> np.ndarray:
        """Mask ``(N, K)``, False where a token has fewer choices than ``K``."""
        return self.wanted < self.num_experts + self.free

    @property
    def dropped(self) -> np.ndarray:
        """Mask ``(N, K)``, True if the expert of the choice was full."""
        return (self.choices < 0) & (self.wanted < self.num_experts)

    @property
    def unrouted(self) -> np.ndarray:
        """Mask ``(N,)``, True for a token that no expert takes, free experts included."""
        return (self.dropped | ~self.chosen).all(1)


@dataclasses.dataclass(frozen=True)
class Observed:
    """``N`` tokens of all documents, in order, as one stack of layers reads them.

    Attributes:
        tokens: Token ids ``(N,)``.
        positions: Positions ``(N,)`` in the document.
        documents: Number ``(N,)`` of the document.
        losses: Negative log-likelihood ``(N,)`` of the next token, in nats; NaN without one, as in
            an encoder.
        layers: The MoE layers in order.
    """

    tokens: np.ndarray
    positions: np.ndarray
    documents: np.ndarray
    losses: np.ndarray
    layers: tuple[ObservedLayer, ...]

    def where(self, mask: np.ndarray) -> Observed:
        """Returns the tokens with ``mask (N,)``."""
        layers = [
            dataclasses.replace(layer, choices=layer.choices[mask], gates=layer.gates[mask])
            for layer in self.layers
        ]
        tokens, positions, documents = (
            x[mask] for x in (self.tokens, self.positions, self.documents)
        )
        return Observed(tokens, positions, documents, self.losses[mask], tuple(layers))


def among(values: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Returns the mask ``(N, K)`` of the values that are among the members of their row.

    Args:
        values: Integers ``(N, K)`` from 0 on.
        members: Integers ``(N, J)`` from 0 on; -1 is no member.
    """
    size = 2 + max(values.max(initial=0), members.max(initial=0))
    found = np.zeros((len(values), size), bool)
    np.put_along_axis(found, members, True, axis=1)
    found[:, -1] = False
    return np.take_along_axis(found, values, 1)


def observe(model: Model, texts: Sequence[Text], batch_size: int) -> tuple[Observed, ...]:
    """Reads documents in evaluation, with the capacity of evaluation; see ``analysed_in``.

    Args:
        model: The model.
        texts: Documents, each no longer than the model reads at once.
        batch_size: Number of documents that are read at once.

    Returns:
        The tokens of each stack: the encoder and the decoder, or the only stack.
    """
    parts = [
        _of_stacks(model, start, batch, *jax.tree.map(np.asarray, _observed(model, batch)))
        for start, batch in batches_of(texts, batch_size)
    ]
    whole = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
    named, found = iter(sparse_layers(model)), []
    for tokens, places, documents, losses, layers in whole:
        own = [
            _layer(f"layer {sparse.name}", sparse.moe, *layer)
            for layer, sparse in zip(layers, named, strict=False)
        ]
        found.append(Observed(tokens, places, documents, losses, tuple(own)))
    return tuple(found)


def analysed_in(model: Model) -> Mode:
    """Returns the mode of evaluation, in which experts choose among each document by itself.

    Padding adds no slots, so that short documents drop tokens as long ones do. If experts choose in
    any layer, no layer in which tokens choose drops a token.
    """
    by_row = any(layer.moe.router.experts_choose for layer in model.config.sparse_layers())
    return Mode("full" if by_row else "eval", record=True, padding_slots=False)


def _reads_ahead(config: ModelConfig) -> bool:
    """True if a token's likelihood depends on later tokens, by attention or by the routing."""
    leaks = (s.stack != "encoder" and s.moe.router.experts_choose for s in config.sparse_layers())
    return not getattr(config, "causal", True) or any(leaks)


def _layer(
    name: str, moe: MoEConfig, choices: np.ndarray, gates: np.ndarray, wanted: np.ndarray
) -> ObservedLayer:
    """Returns the choices ``(N, K)`` of a layer, sorted by gate where experts choose."""
    if not moe.router.experts_choose:
        free = moe.router.free.count
        choices = np.where(wanted, choices, -1 - moe.num_experts - free)
        return ObservedLayer(name, moe.num_experts, choices, gates, free)
    order = np.argsort(np.where(choices >= 0, -gates, np.inf), axis=1, kind="stable")
    taken, weights = (np.take_along_axis(x, order, 1) for x in (choices, gates))
    taken = np.where(taken < 0, -1 - moe.num_experts, taken)
    return ObservedLayer(name, moe.num_experts, taken, weights, experts_choose=True)


def _of_stacks(
    model: Model,
    start: int,
    batch: Batch,
    losses: np.ndarray,
    layers: list[tuple[np.ndarray, ...]],
) -> list[tuple[Any, ...]]:
    """Returns the fields of ``Observed`` for each stack, with the arrays of its layers."""
    found: list[tuple[Any, ...]] = []
    read, rest = read_by(batch), iter(layers)
    for number, (stack, (ids, valid)) in enumerate(zip(stacks(model), read, strict=True), 1):
        documents = np.broadcast_to(np.arange(len(ids))[:, None] + start, ids.shape)
        places = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        known = losses if number == len(read) else np.full(ids.shape, np.nan, np.float32)
        own = list(itertools.islice(rest, stack.num_sparse))
        fields = (ids, places, documents, known, own)
        found.append(jax.tree.map(lambda x, valid=valid: x[valid], fields))
    return found


@jax.jit
def _observed(
    model: Model, batch: Batch
) -> tuple[Float[Array, "B L"], list[tuple[Array, Array, Array]]]:
    """Returns the loss of each next token, and of each layer choices, gates and wanted choices.

    A loss is NaN without a next token, and everywhere if the model reads later tokens.
    """
    hidden, reports = forward(model, batch, analysed_in(model))
    segments = batch["segments"]
    targets, after = (jnp.roll(x, -1, axis=1) for x in (batch["inputs"], segments))
    known = (after > 0) & (jnp.arange(segments.shape[1]) < segments.shape[1] - 1)
    known &= not _reads_ahead(model.config)

    def of_row(row: tuple[Array, Array]) -> Array:
        logits = model.logits(row[0][None])[0]
        chosen = jnp.take_along_axis(logits, row[1][:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    losses = jnp.where(known, jax.lax.map(of_row, (hidden, targets)), jnp.nan)
    layers = []
    for report in reports:
        # The mode records them.
        assert report.choices is not None and report.gates is not None and report.wanted is not None
        layers.append((report.choices, report.gates, report.wanted))
    return losses, layers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Similarity:
    """Similarity of the experts of one layer to each other.

    Attributes:
        weights: Cosine ``(E, E)`` of all weights of two experts.
        outputs: Linear centred kernel alignment ``(E, E)`` of the outputs of two experts for the
            same tokens (Kornblith et al. 2019, 1905.00414).
    """

    weights: Float[Array, "E E"]
    outputs: Float[Array, "E E"]


def similarities(model: Model, texts: Sequence[Text], batch_size: int) -> tuple[Similarity, ...]:
    """Returns the similarity of experts in each MoE layer; all experts read the same tokens.

    At most 128 tokens are compared, spread evenly over at most 16 documents, which are spread
    evenly over all documents.

    Args:
        model: The model.
        texts: Documents, each no longer than the model reads at once.
        batch_size: Number of documents that are read at once.
    """
    count = min(len(texts), _COMPARED_DOCUMENTS)
    chosen = [texts[i] for i in np.linspace(0, len(texts) - 1, count).round().astype(int)]
    each = -(-_COMPARED_TOKENS // count)
    parts = [_outputs(model, batch, each) for _, batch in batches_of(chosen, batch_size)]
    found = []
    for layer in zip(*parts, strict=True):
        cosines, outputs, used = zip(*layer, strict=True)
        aligned = alignment(jnp.concatenate(outputs, 1), jnp.concatenate(used))
        found.append(Similarity(cosines[0], aligned))
    return tuple(found)


@functools.partial(jax.jit, static_argnums=2)
def _outputs(
    model: Model, batch: Batch, each: int
) -> list[tuple[Float[Array, "E E"], Float[Array, "E T N"], Bool[Array, " T"]]]:
    """Returns cosines of weights, and the outputs of all experts for some tokens, by layer.

    Args:
        model: The model.
        batch: Documents ``(B, L)``.
        each: Number of tokens of each document, which are spread evenly over it.

    Returns:
        For each layer the cosines, the outputs of ``T = B * each`` tokens, and the mask of the
        tokens that count: a shorter document has fewer.
    """
    found = []

    def see(
        mixture: ConfiguredMoE, x: Array, valid: Array, given: dict[str, Any], y: Array, aux: MoEAux
    ) -> None:
        del given, y, aux
        lengths = valid.sum(1, keepdims=True)
        columns = jnp.arange(each) * jnp.maximum(lengths, each) // each
        used = jnp.broadcast_to(columns < lengths, columns.shape)
        columns = jnp.minimum(columns, x.shape[1] - 1)
        tokens = jnp.take_along_axis(x, columns[..., None], 1).reshape(-1, x.shape[-1])
        if mixture.config.latent_dim:
            tokens = mixture.latent.project(tokens)
        many = jnp.broadcast_to(tokens, (mixture.config.num_experts, *tokens.shape))
        outputs = mixture.experts(many).astype(jnp.float32)
        found.append((_cosine(mixture), outputs, used.reshape(-1)))

    forward(watch(model, see), batch, analysed_in(model))
    return found


def alignment(outputs: Float[Array, "E T N"], used: Bool[Array, " T"]) -> Float[Array, "E E"]:
    """Returns the linear centred kernel alignment of every pair of outputs.

    Args:
        outputs: Outputs of the experts for tokens.
        used: Whether a token counts.
    """
    outputs = jnp.where(used[:, None], outputs, 0)
    mean = outputs.sum(1, keepdims=True) / jnp.maximum(used.sum(), 1)
    centred = jnp.where(used[:, None], outputs - mean, 0)
    kernels = jnp.einsum("etn,eun->etu", centred, centred)
    flat = kernels.reshape(len(kernels), -1)
    flat = flat / jnp.maximum(jnp.linalg.norm(flat, axis=1, keepdims=True), 1e-30)
    return flat @ flat.T


def _cosine(mixture: ConfiguredMoE) -> Float[Array, "E E"]:
    """Returns the cosine of the weights of every pair of experts; NaN if their widths differ."""
    experts = mixture.config.num_experts
    leaves = jax.tree.leaves(nnx.state(mixture.experts, nnx.Param))
    if any(leaf.shape[0] != experts for leaf in leaves):
        return jnp.full((experts, experts), jnp.nan)
    flat = (leaf.reshape(experts, -1).astype(jnp.float32) for leaf in leaves)
    products = sum((rows @ rows.T for rows in flat), jnp.zeros((experts, experts)))
    norms = jnp.sqrt(jnp.maximum(jnp.diagonal(products), 1e-30))
    return products / norms[:, None] / norms
