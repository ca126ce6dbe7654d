"""One training step and one evaluation step, as pure functions of state and batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moe_jax.nn.mode import EVAL, TRAIN
from moe_jax.nn.moe import MoEAux
from moe_jax.routing import Counts
from moe_jax.training.loss import score_tokens
from moe_jax.training.state import TrainState

Array = jax.Array
Batch = Mapping[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One MoE layer over a batch: mean losses (unweighted) and summed counts."""

    losses: dict[str, Array]
    counts: Counts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepReport:
    """What a training step measured.

    Attributes:
        loss: mean cross-entropy in nats per token.
        objective: what was differentiated: loss, z-loss and the routers' losses.
        grad_norm: global norm before clipping.
        layers: one report per MoE layer.
        updated: whether the update was applied; False if something was not finite.
        skipped: updates skipped so far.
        skipped_in_row: updates skipped since the last good one.
    """

    loss: Array
    objective: Array
    grad_norm: Array
    layers: tuple[LayerReport, ...]
    updated: Array
    skipped: Array
    skipped_in_row: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EvalSums:
    """Sums over a batch that add up over batches.

    Attributes:
        nll: negative log-likelihood in nats.
        correct: tokens whose best guess was right.
        tokens: target tokens.
        bytes: bytes the targets stand for.
        layers: one ``Counts`` per MoE layer.
    """

    nll: Array
    correct: Array
    tokens: Array
    bytes: Array
    layers: tuple[Counts, ...]


@dataclasses.dataclass(frozen=True)
class Objective:
    """How a batch becomes a number to minimise.

    Attributes:
        microbatches: parts the batch is cut into, one after the other; the gradient is that of
            the whole batch.
        loss_chunk: see ``moe_jax.training.loss.score_tokens``.
        z_loss: weight of the squared log-partition of the head (T5 uses 1e-4).
    """

    microbatches: int = 1
    loss_chunk: int = 0
    z_loss: float = 0.0

    def value_and_gradient(
        self, graph: nnx.GraphDef, state: TrainState, batch: Batch
    ) -> tuple[nnx.State, Array, Array, tuple[LayerReport, ...]]:
        """Returns gradient, objective, cross-entropy and layer reports of the whole batch."""
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        keys = jax.random.split(key, self.microbatches)
        tokens = (batch["segments"] > 0).sum()

        def share(params: nnx.State, part: Batch, key: Array):
            model = nnx.merge(graph, params, state.router_state)
            return self._share(model, part, key, tokens)

        def one(step: tuple[Batch, Array]) -> tuple[Any, ...]:
            (value, report), gradient = jax.value_and_grad(share, has_aux=True)(state.params, *step)
            return gradient, value, *report

        if self.microbatches == 1:
            return one((batch, keys[0]))
        steps = (_split(batch, self.microbatches), keys)
        shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], steps))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        sums, _ = jax.lax.scan(
            lambda sums, step: (jax.tree.map(jnp.add, sums, one(step)), None), zeros, steps
        )
        return sums

    def _share(
        self, model: nnx.Module, part: Batch, key: Array, tokens: Array
    ) -> tuple[Array, tuple[Array, tuple[LayerReport, ...]]]:
        """The part's share of the objective: shares of all parts add up to the batch's value."""
        hidden, reports = model.hidden(
            part["inputs"], part["segments"], part["positions"], mode=TRAIN, rng=key
        )
        scored = score_tokens(model, hidden, part["targets"], chunk=self.loss_chunk)
        mask = part["segments"] > 0
        count = jnp.maximum(tokens, 1)
        share = mask.sum() / count
        loss = (scored.nll * mask).sum() / count
        z_loss = self.z_loss * (scored.log_z**2 * mask).sum() / count
        objective = loss + z_loss + share * sum((aux.loss for aux in reports), jnp.float32(0))
        return objective, (loss, tuple(_layer(aux, share) for aux in reports))


def _layer(aux: MoEAux, share: Array) -> LayerReport:
    losses = {name: value * share for name, value in aux.losses.items()}
    return jax.lax.stop_gradient(LayerReport(losses, aux.counts))


def _split(batch: Batch, parts: int) -> Batch:
    return {name: x.reshape(parts, x.shape[0] // parts, *x.shape[1:]) for name, x in batch.items()}


def train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, StepReport]:
    """Takes one optimizer step.

    Args:
        graph: definition of the model.
        optimizer: the transformation.
        objective: the loss.
        state: donated by the caller's ``jit``.
        batch: ``inputs``, ``targets``, ``segments``, ``positions``, each ``(B, L)`` int32.

    Returns:
        The next state and the report. If loss or gradient is not finite, parameters and optimizer
        stay as they are and the skip is counted.
    """
    gradient, value, loss, layers = objective.value_and_gradient(graph, state, batch)
    norm = optax.global_norm(gradient)
    finite = jnp.isfinite(norm) & jnp.isfinite(value)

    def update() -> tuple[nnx.State, Any]:
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates), opt_state

    params, opt_state = jax.lax.cond(finite, update, lambda: (state.params, state.opt_state))
    skipped = state.skipped + jnp.where(finite, 0, 1)
    in_row = jnp.where(finite, 0, state.skipped_in_row + 1)
    after = TrainState(
        state.step + 1, params, state.router_state, opt_state, state.key, skipped, in_row
    )
    return after, StepReport(loss, value, norm, layers, finite, skipped, in_row)


def eval_step(
    graph: nnx.GraphDef, loss_chunk: int, params: nnx.State, router_state: nnx.State, batch: Batch
) -> EvalSums:
    """Returns the sums of one validation batch, which also holds ``bytes (B, L)``."""
    model = nnx.merge(graph, params, router_state)
    hidden, reports = model.hidden(
        batch["inputs"], batch["segments"], batch["positions"], mode=EVAL
    )
    scored = score_tokens(model, hidden, batch["targets"], chunk=loss_chunk)
    mask = batch["segments"] > 0
    return EvalSums(
        nll=(scored.nll * mask).sum(),
        correct=(scored.correct & mask).sum(),
        tokens=mask.sum(),
        bytes=(batch["bytes"] * mask).sum(),
        layers=tuple(aux.counts for aux in reports),
    )
