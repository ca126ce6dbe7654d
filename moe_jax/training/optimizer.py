"""Optax optimizers from settings, with a learning rate per group of parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moe_jax.config.experiment import Experiment
from moe_jax.config.frozen_schedules import FrozenStage
from moe_jax.config.optimizer import OptimizerConfig, map_variables
from moe_jax.training.average import keep_average
from moe_jax.training.expert_rates import scale_by_use
from moe_jax.training.frozen import fixed_experts, paused, trained_only


def learning_rate(config: OptimizerConfig, step: jax.Array, steps: int) -> jax.Array:
    """Returns the learning rate of update ``step`` (from 0) of ``steps``, a float32 scalar."""
    number = (jnp.asarray(step) + 1).astype(jnp.float32)
    warm = jnp.minimum(number / max(config.warmup_steps, 1), 1.0)
    factor = config.schedule.factor(number, config.warmup_steps, steps)
    return config.learning_rate * warm * factor


def optimizer_of(experiment: Experiment) -> optax.GradientTransformation:
    """Returns the optimizer of a run, which keeps no state for frozen parameters."""
    stages = experiment.frozen_stages
    optimizer = make_optimizer(experiment.optimizer, experiment.training.steps, stages)
    frozen = experiment.frozen_leaves
    return trained_only(optimizer, frozen) if frozen else optimizer


def make_optimizer(
    config: OptimizerConfig, steps: int, stages: Sequence[FrozenStage] = ()
) -> optax.GradientTransformation:
    """Returns the optimizer for a state of ``nnx.Param``; its schedule ends after ``steps``.

    All parameters are trained, also those of ``config.frozen``; see ``optimizer_of``.

    Args:
        config: Settings of the optimizer.
        steps: Number of steps of the run.
        stages: Groups that are frozen at some steps; ``update`` then takes the keyword ``frozen``.
    """
    rule = config.rule.transform(config.decayed)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    groups = {
        "dense": optax.identity(),
        "expert": optax.scale(config.expert_multiplier),
        "router": optax.scale(config.router_multiplier),
    }
    by_use = [scale_by_use(config.expert_rates)] if config.expert_rates else []
    fixed = [fixed_experts(config.frozen_experts)] if config.frozen_experts else []
    average = [keep_average(config.ema_decay)] if config.ema_decay else []
    return optax.chain(
        clip,
        paused(rule, stages) if stages else rule,
        optax.partition(groups, parameter_groups),
        *by_use,
        optax.scale_by_learning_rate(lambda count: learning_rate(config, count, steps)),
        *fixed,
        *average,
    )


def parameter_groups(params: Any) -> Any:
    """Returns ``params`` with each array replaced by ``dense``, ``expert`` or ``router``."""

    def one(param: nnx.Variable) -> nnx.Variable:
        axes = param.get_metadata()["axes"]
        group = next((name for name in ("expert", "router") if name in axes), "dense")
        return param.replace(group)

    return map_variables(one, params)
