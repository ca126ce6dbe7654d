"""Predicts the experts of the next MoE layer from the hidden states of a layer.

The router of the next layer reads the hidden states early, as a prefetch of experts does (Eliseev
and Mazur 2023, 2312.17238).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from moe_jax.analysis.contributions import watch
from moe_jax.analysis.forward import Batch, forward, stacks
from moe_jax.analysis.observed import Observed, ObservedLayer, among, analysed_in
from moe_jax.analysis.texts import Text, batches_of, read_by
from moe_jax.models import Model
from moe_jax.nn.block import Block
from moe_jax.nn.groups import out_of_groups
from moe_jax.nn.mode import DECODE
from moe_jax.nn.moe import ConfiguredMoE, MoEAux, taken_by
from moe_jax.routing import Slots

# Branch of a block that an MoE layer is in, by the name of the layer.
_BRANCHES = {"attention_experts": "attention", "feed_forward": "feed_forward"}


@jax.jit
def foreseen(model: Model, batch: Batch) -> tuple[Int[Array, "B L K"] | None, ...]:
    """Returns, for each MoE layer, the choices of the next one that its hidden states predict.

    The hidden states are the residual stream before the MoE layer. The next layer's norm and router
    read them, with the ids and the carried values that the router gets.

    Args:
        model: Decoder or encoder-decoder.
        batch: Fields of ``moe_jax.analysis.forward``.

    Returns:
        The choices ``(B, L, K)`` before capacity. Where experts choose, ``K`` is ``E``, and -1
        stands for an expert that does not take the token. The last MoE layer of a stack has
        ``None``, and so have experts of attention projections, which have no residual stream.
    """
    seen: list[tuple[Array, dict[str, Any]]] = []

    def see(
        mixture: ConfiguredMoE, x: Array, valid: Array, given: dict[str, Any], y: Array, aux: MoEAux
    ) -> None:
        del mixture, x, y, aux
        seen.append((valid, given))

    forward(watch(model, see), batch, analysed_in(model))
    found: list[Array | None] = []
    for stack in stacks(model):
        blocks = (layer.take(layer.block) for layer in stack.layers())
        named = [(block, name) for block in blocks for name in block.mixtures]
        own, seen = seen[: len(named)], seen[len(named) :]
        for (_, before), (block, name), (valid, given) in zip(
            own, named[1:], own[1:], strict=False
        ):
            found.append(_predicted(before.get("residual"), block, name, valid, given))
        found += [None] * bool(named)
    return tuple(found)


def _predicted(
    hidden: Array | None, block: Block, name: str, valid: Array, given: dict[str, Any]
) -> Array | None:
    """Returns the choices ``(B, L, K)`` of a block's MoE layer for earlier hidden states."""
    if hidden is None:
        return None
    mixture = block.mixtures[name]
    x = block.branch_input(_BRANCHES[name], hidden)
    context = {key: given.get(key) for key in ("token_ids", "record", "carried")}
    read = mixture.router_input(mixture.groups_of(x, DECODE), hidden)
    plan, _ = mixture.plan(read, valid, mode=DECODE, **context)
    if not isinstance(plan.slots, Slots):
        return None
    if plan.slots.expert is None:
        took = out_of_groups(taken_by(plan), valid.shape)
        return jnp.where(took, jnp.arange(took.shape[-1]), -1)
    choices = jnp.where(plan.slots.expert < 0, -1 - plan.slots.expert, plan.slots.expert)
    if plan.slots.wanted is not None:
        choices = jnp.where(plan.slots.wanted, choices, -1)
    return out_of_groups(choices, valid.shape)


def foresight(
    model: Model, texts: Sequence[Text], observed: Sequence[Observed], batch_size: int
) -> list[dict[str, float] | None]:
    """Returns how many choices of the next MoE layer the hidden states of each layer predict.

    Args:
        model: The model.
        texts: Documents.
        observed: The same documents, observed in each stack.
        batch_size: Number of documents that are read at once.

    Returns:
        For each MoE layer the ``accuracy``, the share of the choices of the next layer that are
        among its predicted choices, and ``chance``, this share if the most frequent experts are
        predicted for every token; ``None`` for a layer without a prediction.
    """
    parts = []
    for _, batch in batches_of(texts, batch_size):
        found = jax.tree.map(np.asarray, foreseen(model, batch))
        masks = [
            valid
            for stack, (_, valid) in zip(stacks(model), read_by(batch), strict=True)
            for _ in range(stack.num_sparse)
        ]
        pairs = zip(found, masks, strict=True)
        parts.append([None if one is None else one[valid] for one, valid in pairs])
    whole = [None if one[0] is None else np.concatenate(one) for one in zip(*parts, strict=True)]
    layers = [layer for one in observed for layer in one.layers]
    scores: list[dict[str, float] | None] = []
    for predicted, after in itertools.zip_longest(whole, layers[1:]):
        scores.append(None if predicted is None else score(predicted, after))
    return scores


def score(predicted: np.ndarray, layer: ObservedLayer) -> dict[str, float]:
    """Returns ``accuracy`` and ``chance`` of predicted choices ``(N, K)``; see ``foresight``.

    Chance predicts as many experts per token as ``predicted`` does on average.
    """
    chosen = layer.wanted[layer.chosen]
    known, counts = np.unique(chosen, return_counts=True)
    each = max(1, round((predicted >= 0).sum(1).mean()))
    frequent = known[np.argsort(-counts, kind="stable")][:each]
    right = among(layer.wanted, predicted)[layer.chosen]
    return {"accuracy": float(right.mean()), "chance": float(np.isin(chosen, frequent).mean())}
