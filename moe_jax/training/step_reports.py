"""Numbers that a training step and an evaluation step return."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
from flax import nnx

from moe_jax.routing import Counts
from moe_jax.training.noise import GradientNoise

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerReport:
    """The report of one MoE layer over a batch.

    Attributes:
        losses: Mean losses by name, unweighted.
        counts: Counts, summed over groups.
    """

    losses: dict[str, Array]
    counts: Counts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Losses:
    """The losses of a batch, under their names in ``metrics.jsonl``.

    Each loss is a mean over the batch's target tokens. The losses of microbatches, divided by the
    number of tokens of the whole batch, add up to the losses of the batch.

    Attributes:
        loss: Cross-entropy against the targets, in nats.
        lookahead_loss: Cross-entropy ``(D,)`` of the tokens 2, 3, ... ahead, in nats per token with
            such a target. (The objective divides by the number of all tokens, as the paper does.)
        distillation_loss: Cross-entropy against the teacher's distribution, in nats; ``None``
            without a teacher.
        objective: Weighted sum of these losses, the z-loss and the routers' losses. The step
            differentiates this sum.
        routing_loss: Divergence of the routing distribution from the teacher's, in nats per token
            and as a mean over MoE layers; ``None`` without such a loss.
    """

    loss: Array
    lookahead_loss: Array
    distillation_loss: Array | None
    objective: Array
    routing_loss: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepReport:
    """The measurements of a training step.

    Attributes:
        losses: Losses of the batch, before the update.
        grad_norm: Global norm of the gradient before clipping.
        layers: Reports of all MoE layers.
        choices: Choices ``(B, L, K)`` int16 per MoE layer, if the objective records them; see
            ``MoEAux``.
        updated: True if the update was applied; False if loss, gradient, or a parameter or
            statistic after the update was not finite.
        skipped: Number of skipped updates so far.
        skipped_in_row: Number of skipped updates since the last applied update.
        noise: Estimates of the gradient's noise; ``None`` if the objective does not measure it.
        settings: Values of the scheduled settings at this step, by name.
    """

    losses: Losses
    grad_norm: Array
    layers: tuple[LayerReport, ...]
    choices: tuple[Array | None, ...]
    updated: Array
    skipped: Array
    skipped_in_row: Array
    noise: GradientNoise | None = None
    settings: dict[str, Array] = dataclasses.field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EvalSums:
    """Sums over a validation batch, which add up over batches.

    Attributes:
        nll: Negative log-likelihood in nats.
        correct: Number of targets that greedy decoding takes.
        tokens: Number of target tokens.
        bytes: Number of bytes of text that the targets encode.
        layers: Counts of all MoE layers.
    """

    nll: Array
    correct: Array
    tokens: Array
    bytes: Array
    layers: tuple[Counts, ...]


class Measured(NamedTuple):
    """The gradient of a batch, and what was measured with it.

    Attributes:
        gradient: Gradient of the objective, with the structure of the parameters.
        losses: Losses of the batch.
        layers: Reports of all MoE layers.
        choices: Choices ``(B, L, K)`` of each MoE layer, or ``None``.
        noise: Estimates of the gradient's noise, or ``None``.
    """

    gradient: nnx.State
    losses: Losses
    layers: tuple[LayerReport, ...]
    choices: tuple[Array | None, ...]
    noise: GradientNoise | None = None
