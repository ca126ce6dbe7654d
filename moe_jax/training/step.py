"""One training step and one evaluation step, as pure functions of state and batch."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.nn.mode import EVAL
from moe_jax.training.expert_rates import use_of
from moe_jax.training.frozen import kept, kept_now
from moe_jax.training.loss import score_tokens
from moe_jax.training.objective import Objective, Teacher, predicted_tokens
from moe_jax.training.state import TrainState, all_finite, split_model
from moe_jax.training.step_reports import EvalSums, LayerReport, Losses, Measured, StepReport

__all__ = [
    "EvalSums",
    "LayerReport",
    "Losses",
    "Measured",
    "Objective",
    "StepReport",
    "Teacher",
    "eval_step",
    "jit_train_step",
    "predicted_tokens",
    "train_step",
]

Array = jax.Array
Batch = Mapping[str, Array]


def train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    state: TrainState,
    batch: Batch,
    teacher: Teacher | None = None,
) -> tuple[TrainState, StepReport]:
    """Returns the state after one optimizer step, and the report of the step.

    If loss, gradient, or a number of the next state is not finite, then the update is skipped and
    counted: parameters, router state and optimizer state stay unchanged.

    Args:
        graph: Graph definition of the model.
        optimizer: Optax transformation.
        objective: Objective of training.
        state: State before the step; the caller's ``jit`` donates it.
        batch: Arrays ``inputs``, ``targets``, ``segments``, ``positions``, each ``(B, L)`` int32;
            for an encoder also ``encoder_inputs`` and ``encoder_segments (B, T)``; for a replay
            also ``routing``, ``(B, L, K)`` per MoE layer.
        teacher: Teacher, if the objective has a teacher's weight.
    """
    measured = objective.value_and_gradient(graph, state, batch, teacher)
    gradient, losses, layers, choices, noise = measured
    grad_norm = optax.global_norm(gradient)
    now = objective.frozen_now(state)

    def fixed(after: nnx.State, field: str) -> nnx.State:
        before = getattr(state, field)
        return kept_now(kept(after, before, objective.frozen, field), before, now, field)

    routers = fixed(_next_router_state(graph, state, layers), "router_state")
    use = _use(graph, state, layers)

    def update() -> tuple[nnx.State, nnx.State, Any]:
        with jax.named_scope("optimizer"):
            rule = optax.with_extra_args_support(optimizer)
            more = {"use": use, "frozen": now}
            updates, opt_state = rule.update(gradient, state.opt_state, state.params, **more)
            params = optax.apply_updates(state.params, updates)
            return fixed(params, "params"), routers, opt_state

    # The update is computed twice, since a second copy of the state might not fit into memory.
    finite = jnp.isfinite(grad_norm) & jnp.isfinite(losses.objective) & all_finite(update())
    params, routers, opt_state = jax.lax.cond(
        finite, update, lambda: (state.params, state.router_state, state.opt_state)
    )
    skipped = state.skipped + jnp.where(finite, 0, 1)
    in_row = jnp.where(finite, 0, state.skipped_in_row + 1)
    after = TrainState(state.step + 1, params, routers, opt_state, state.key, skipped, in_row)
    return after, StepReport(
        losses=losses,
        grad_norm=grad_norm,
        layers=layers,
        choices=choices,
        updated=finite,
        skipped=skipped,
        skipped_in_row=in_row,
        noise=noise,
        settings=objective.settings(state),
    )


def _use(
    graph: nnx.GraphDef, state: TrainState, layers: tuple[LayerReport, ...]
) -> dict[str, Array]:
    """Returns the number of tokens of each expert in the step; see ``use_of``."""
    if not layers:
        return {}
    model = nnx.merge(graph, state.params, state.router_state)
    return use_of(model, [layer.counts.load for layer in layers])


def _next_router_state(
    graph: nnx.GraphDef, state: TrainState, layers: tuple[LayerReport, ...]
) -> nnx.State:
    """Returns the routers' next state, from the counts of the whole step."""
    if not layers:
        return state.router_state
    # A merged module shares its variables with the state; the copy keeps the old state unchanged.
    routers = jax.tree.map(lambda x: x, state.router_state)
    model = nnx.merge(graph, state.params, routers)
    model.update_routers([layer.counts for layer in layers])
    return split_model(model)[2]


def eval_step(
    graph: nnx.GraphDef, loss_chunk: int, params: nnx.State, router_state: nnx.State, batch: Batch
) -> EvalSums:
    """Returns the sums of one validation batch; the batch also holds ``bytes (B, L)``."""
    model = nnx.merge(graph, params, router_state)
    reading = model.read(batch, mode=EVAL)
    scored = score_tokens(model.embedding, reading.hidden, batch["targets"], chunk=loss_chunk)
    valid = predicted_tokens(batch)
    return EvalSums(
        nll=(scored.nll * valid).sum(),
        correct=(scored.correct & valid).sum(),
        tokens=valid.sum(),
        bytes=(batch["bytes"] * valid).sum(),
        layers=tuple(aux.counts for aux in reading.reports),
    )


def jit_train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    abstract: TrainState,
) -> Any:
    """Returns the jitted function ``(state, batch) -> (state, StepReport)``; it donates the state.

    The function has the teacher as third argument if the objective has one. The report is
    replicated on every device, so that every process can read it.

    Args:
        graph: Graph definition of the model.
        optimizer: Optax transformation.
        objective: Objective of training.
        abstract: Shapes and shardings of the state, which the next state keeps.
    """
    step = functools.partial(train_step, graph, optimizer, objective)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    assert isinstance(abstract.step.sharding, NamedSharding)  # as in every state of a recipe
    replicated = NamedSharding(abstract.step.sharding.mesh, PartitionSpec())
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated))
