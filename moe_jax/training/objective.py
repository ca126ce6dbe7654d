"""The objective of training: losses of a batch, and their gradient over microbatches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config.experiment import Experiment
from moe_jax.config.frozen_schedules import FrozenStage
from moe_jax.config.setting_schedules import HEAD_Z, LOOKAHEAD, SettingSchedule, current
from moe_jax.errors import ConfigError
from moe_jax.models import Model, Reading
from moe_jax.models.lookahead import ahead, valid_ahead
from moe_jax.nn.mode import EVAL, Mode
from moe_jax.nn.moe import MoEAux
from moe_jax.nn.padding import valid_tokens
from moe_jax.parallel import constrain_parameters
from moe_jax.routing.balance import BATCH_LOAD
from moe_jax.training.frozen import frozen_now, stopped, stopped_experts, stopped_now
from moe_jax.training.loss import TokenScores, distil_tokens, score_tokens
from moe_jax.training.noise import GradientNoise, gradient_noise, squared_norm
from moe_jax.training.routing_loss import routing_loss
from moe_jax.training.state import TrainState, split_model
from moe_jax.training.step_reports import LayerReport, Losses, Measured

Array = jax.Array
Batch = Mapping[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Teacher:
    """A trained model whose probabilities are soft targets.

    Attributes:
        graph: Graph definition of the model.
        params: Parameters, in their shardings.
        router_state: State of the routers at the end of the teacher's training.
    """

    graph: nnx.GraphDef = dataclasses.field(metadata={"static": True})
    params: nnx.State
    router_state: nnx.State

    def read(self, batch: Batch, *, shares: bool = False) -> tuple[Model, Reading]:
        """Returns the model and its reading in evaluation, which has no gradient.

        Args:
            batch: Batch of the student.
            shares: True reports the routing distribution of each MoE layer.
        """
        model = nnx.merge(self.graph, self.params, self.router_state)
        unforced = {name: value for name, value in batch.items() if name != "routing"}
        reading = model.read(unforced, mode=dataclasses.replace(EVAL, shares=shares))
        return model, jax.lax.stop_gradient(reading)


@dataclasses.dataclass(frozen=True)
class Objective:
    """The function of a batch that training minimises.

    Attributes:
        microbatches: Number of parts of the batch that are computed one after the other; the
            gradient is the gradient of the whole batch.
        loss_chunk: Number of positions per chunk; see ``moe_jax.training.loss.score_tokens``.
        z_loss: Weight of the squared log-partition of the head (T5 uses 1e-4).
        lookahead_weight: Weight of the mean loss of the tokens further ahead (DeepSeek-V3,
            2412.19437, section 2.2).
        record: True reports every token's choices.
        teacher_weight: Weight ``w`` of the cross-entropy against the teacher's distribution; the
            cross-entropy against the targets has the weight ``1 - w``. ``None`` without a teacher.
        noise: True estimates the noise of the gradient from several microbatches.
        frozen: Names of leaves of the state that stay as they are; see ``moe_jax.training.frozen``.
            Their gradients are zero and not part of the global norm.
        teacher_temperature: Number by which the logits of both models are divided in the
            cross-entropy against the teacher's distribution; see ``distil_tokens``.
        schedules: Schedules of settings, which replace the settings of the same names.
        routing_weight: Weight of the divergence of the routing distribution from the teacher's.
        routing_groups: Group of each expert of the teacher, by MoE layer; see
            ``moe_jax.training.routing_loss``.
        frozen_experts: Number of first experts of each layer whose gradients are zero.
        stages: Leaves of the state that stay as they are at some steps, as ``frozen`` do at all.
    """

    microbatches: int = 1
    loss_chunk: int = 0
    z_loss: float = 0.0
    lookahead_weight: float = 0.3
    record: bool = False
    teacher_weight: float | None = None
    noise: bool = False
    frozen: frozenset[str] = frozenset()
    teacher_temperature: float = 1.0
    schedules: tuple[SettingSchedule, ...] = ()
    routing_weight: float = 0.0
    routing_groups: tuple[tuple[int, ...], ...] = ()
    frozen_experts: int = 0
    stages: tuple[FrozenStage, ...] = ()

    @classmethod
    def of(cls, experiment: Experiment) -> Objective:
        """Returns the objective of a run."""
        training = experiment.training
        return cls(
            microbatches=training.microbatches,
            loss_chunk=training.loss_chunk,
            z_loss=training.z_loss,
            lookahead_weight=training.lookahead_weight,
            record=training.record_routing,
            teacher_weight=training.teacher_weight if training.teacher else None,
            noise=training.noise_scale,
            frozen=experiment.frozen_leaves,
            teacher_temperature=training.teacher_temperature,
            schedules=training.schedules,
            routing_weight=training.routing_weight if training.teacher else 0.0,
            routing_groups=training.routing_groups,
            frozen_experts=experiment.optimizer.frozen_experts,
            stages=experiment.frozen_stages,
        )

    def settings(self, state: TrainState) -> dict[str, Array]:
        """Returns the values of the scheduled settings at the step after ``state``, by name."""
        return current(self.schedules, state.step + 1)

    def frozen_now(self, state: TrainState) -> dict[str, Array]:
        """Returns whether each leaf of ``stages`` is frozen at the step after ``state``."""
        return frozen_now(self.stages, state.step + 1) if self.stages else {}

    def value_and_gradient(
        self, graph: nnx.GraphDef, state: TrainState, batch: Batch, teacher: Teacher | None = None
    ) -> Measured:
        """Returns the gradient and the measurements of a batch.

        The result has one report and one array of choices per MoE layer.

        Raises:
            ConfigError: If the objective has a teacher's weight and there is no teacher, or the
                reverse.
        """
        if (teacher is None) != (self.teacher_weight is None):
            raise ConfigError("this command does not load training.teacher: unset it")
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        keys = jax.random.split(key, self.microbatches)
        tokens = predicted_tokens(batch).sum()
        routed = _routed(nnx.merge(graph, state.params, state.router_state), batch)

        router_state, now = state.router_state, self.frozen_now(state)
        of_layers = [schedule for schedule in self.schedules if schedule.group is None]
        settings = current(of_layers, state.step + 1)

        def share(params: nnx.State, part: Batch, key: Array) -> tuple[Array, Any]:
            trained = stopped_experts(stopped(params, self.frozen), self.frozen_experts)
            model = nnx.merge(graph, stopped_now(trained, now), router_state)
            losses, *rest = self._share(model, part, key, tokens, routed, teacher, settings)
            return losses.objective, (losses, *rest)

        def one(step: tuple[Batch, Array]) -> tuple[Any, Any]:
            (_, report), gradient = jax.value_and_grad(share, has_aux=True)(state.params, *step)
            losses, layers, choices = report
            squares = squared_norm(gradient) if self.noise else None
            return (constrain_parameters(gradient), losses, layers, squares), choices

        if self.microbatches == 1:
            (gradient, losses, layers, squares), choices = one((batch, keys[0]))
        else:
            steps = (_split(batch, self.microbatches), keys)
            if _read_whole_batches(router_state):
                demands = _demands(functools.partial(share, state.params), steps)
                router_state = _announced(graph, state, demands)
            (gradient, losses, layers, squares), choices = _add_up(one, steps)
        noise = None if squares is None else self._noise(squares, gradient, batch)
        return Measured(gradient, _per_target(losses, batch, tokens), layers, choices, noise)

    def _noise(self, squares: Array, gradient: nnx.State, batch: Batch) -> GradientNoise:
        """Returns the noise, from the summed squared norms of the microbatches' shares."""
        tokens = predicted_tokens(batch).reshape(self.microbatches, -1).sum(1)
        return gradient_noise(squares, squared_norm(gradient), tokens)

    def _share(
        self,
        model: Model,
        part: Batch,
        key: Array,
        tokens: Array,
        routed: list[Array],
        teacher: Teacher | None,
        settings: Mapping[str, Array],
    ) -> tuple[Losses, tuple[LayerReport, ...], tuple[Array | None, ...]]:
        """Returns a part's share of the losses; the shares of all parts add up to the batch's loss.

        Args:
            model: Model that reads the part.
            part: Part of the batch.
            key: Key of all randomness in this part.
            tokens: Number of targets of the whole batch.
            routed: Number of tokens that each MoE layer routes in the whole batch.
            teacher: Teacher, if the objective has one.
            settings: Values of the scheduled settings at this step, by name.
        """
        compared = self.routing_weight > 0
        mode = Mode("train", record=self.record, settings=settings, shares=compared)
        reading = model.read(part, mode=mode, rng=key)
        taught = None if teacher is None else teacher.read(part, shares=compared)
        scored = self._scored(model, reading.hidden, part, taught)
        valid = predicted_tokens(part)
        count = jnp.maximum(tokens, 1)
        loss = (scored.nll * valid).sum() / count
        distillation_loss, mixed = None, loss
        weight = self.teacher_weight
        if scored.distillation is not None and weight is not None:
            distillation_loss = (scored.distillation * valid).sum() / count
            mixed = (1 - weight) * loss + weight * distillation_loss
        z_loss = settings.get(HEAD_Z, self.z_loss) * (scored.log_z**2 * valid).sum() / count
        lookahead_loss = self._lookahead_nll(model, reading, part) / count
        of_part = _routed(model, part)
        shares = [ours / jnp.maximum(all_, 1) for ours, all_ in zip(of_part, routed, strict=True)]
        weighted = list(zip(reading.reports, shares, strict=True))
        objective = mixed + z_loss + sum(share * aux.loss for aux, share in weighted)
        if lookahead_loss.size:
            further = settings.get(LOOKAHEAD, self.lookahead_weight)
            objective += further * lookahead_loss.mean()
        routing = None
        if taught is not None and compared:
            routing = self._routing(model, reading, taught[1], part, routed)
            objective += self.routing_weight * routing
        losses = Losses(loss, lookahead_loss, distillation_loss, objective, routing)
        layers = tuple(_layer(aux, share) for aux, share in weighted)
        return losses, layers, tuple(aux.choices for aux in reading.reports)

    def _routing(
        self, model: Model, reading: Reading, taught: Reading, part: Batch, routed: list[Array]
    ) -> Array:
        """Returns a part's share of the divergence from the teacher's routing distributions."""
        ours, theirs = (
            [aux.log_shares for aux in one.reports if aux.log_shares is not None]
            for one in (reading, taught)
        )
        valid = [mask for _, mask in model.routed(part)]
        return routing_loss(ours, theirs, self.routing_groups, valid, routed)

    def _scored(
        self, model: Model, hidden: Array, part: Batch, taught: tuple[Model, Reading] | None
    ) -> TokenScores:
        head, targets, chunk = model.embedding, part["targets"], self.loss_chunk
        if taught is None:
            return score_tokens(head, hidden, targets, chunk=chunk)
        other, theirs = taught
        return distil_tokens(
            (head, other.embedding),
            hidden,
            targets,
            theirs.hidden,
            chunk=chunk,
            temperature=self.teacher_temperature,
        )

    def _lookahead_nll(self, model: Model, reading: Reading, part: Batch) -> Array:
        """Returns the summed cross-entropies ``(D,)`` of the tokens 2, 3, ... ahead, in nats."""
        sums = []
        for steps, hidden in enumerate(reading.ahead, start=1):
            targets = ahead(part["targets"], steps)
            scored = score_tokens(model.embedding, hidden, targets, chunk=self.loss_chunk)
            sums.append((scored.nll * valid_ahead(part["segments"], steps)).sum())
        return jnp.array(sums, jnp.float32)


def predicted_tokens(batch: Batch) -> Array:
    """Returns the mask ``(B, L)`` of the targets that count: all tokens, or the masked ones."""
    valid = valid_tokens(batch["segments"])
    return valid & (batch["predicted"] > 0) if "predicted" in batch else valid


def _read_whole_batches(router_state: nnx.State) -> bool:
    """Returns whether a router has a loss that reads the choices of the whole batch."""
    paths = jax.tree_util.tree_flatten_with_path(router_state)[0]
    return any(BATCH_LOAD in jax.tree_util.keystr(path) for path, _ in paths)


def _demands(share: Callable[[Batch, Array], tuple[Array, Any]], steps: Any) -> list[Array]:
    """Returns the choices ``(E,)`` of each MoE layer over all microbatches, by a forward pass."""

    def one(step: tuple[Batch, Array]) -> list[Array]:
        _, (_, layers, _) = share(*step)
        return [report.counts.demand for report in layers]

    return [demand.sum(0) for demand in jax.lax.map(one, steps)]


def _announced(graph: nnx.GraphDef, state: TrainState, demands: list[Array]) -> nnx.State:
    """Returns the routers' state with the choices of the whole batch."""
    # A merged module shares its variables with the state; the copy keeps the old state unchanged.
    model = nnx.merge(graph, state.params, jax.tree.map(lambda x: x, state.router_state))
    model.announce_load(jax.lax.stop_gradient(demands))
    return split_model(model)[2]


def _add_up(one: Callable[[Any], tuple[Any, Any]], steps: Any) -> tuple[Any, Any]:
    """Returns the sums of all microbatches' first results, and their second results by row."""
    shapes, _ = jax.eval_shape(one, jax.tree.map(lambda x: x[0], steps))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(sums: Any, step: Any) -> tuple[Any, Any]:
        more, rows = one(step)
        return jax.tree.map(jnp.add, sums, more), rows

    sums, rows = jax.lax.scan(add, zeros, steps)
    return sums, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)


def _per_target(losses: Losses, batch: Batch, tokens: Array) -> Losses:
    """Returns the losses, with each lookahead loss divided by its own number of targets."""
    steps = range(1, losses.lookahead_loss.size + 1)
    if not steps:
        return losses
    targets = jnp.stack([valid_ahead(batch["segments"], step).sum() for step in steps])
    per_target = losses.lookahead_loss * jnp.maximum(tokens, 1) / jnp.maximum(targets, 1)
    return dataclasses.replace(losses, lookahead_loss=per_target)


def _routed(model: Model, batch: Batch) -> list[Array]:
    """Returns the number of tokens that each MoE layer routes."""
    return [valid.sum() for _, valid in model.routed(batch)]


def _layer(aux: MoEAux, share: Array) -> LayerReport:
    losses = {name: value * share for name, value in aux.losses.items()}
    return jax.lax.stop_gradient(LayerReport(losses, aux.counts))


def _split(batch: Batch, parts: int) -> Batch:
    return jax.tree.map(lambda x: x.reshape(parts, x.shape[0] // parts, *x.shape[1:]), dict(batch))
