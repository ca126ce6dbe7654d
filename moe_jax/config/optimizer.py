"""Settings of the optimizer: update rules, learning rates and weight decay of the papers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import optax
from flax import nnx
from optax import contrib

from moe_jax.config.expert_rates import ExpertRates
from moe_jax.config.schedules import (
    Constant,
    Cosine,
    CosineRestarts,
    ExponentialRise,
    Linear,
    RSqrt,
    WarmupStableDecay,
)
from moe_jax.nn.projection import is_projection, number_of_inputs, without_experts
from moe_jax.ranges import (
    Chance,
    Epsilon,
    Factor,
    Natural,
    NonNegative,
    Positive,
    PositiveShare,
    Ranged,
    Weight,
)

# Function from parameters to the same tree of bools: True for each parameter with weight decay.
Mask: TypeAlias = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class AdamW(Ranged):
    """AdamW (Loshchilov & Hutter, 1711.05101), with weight decay on matrices only.

    Attributes:
        b1: Decay rate of the first moment.
        b2: Decay rate of the second moment.
        eps: Number added to the root of the second moment.
        weight_decay: Weight decay per step, multiplied by the learning rate.
    """

    b1: Chance = 0.9
    b2: Chance = 0.95
    eps: Epsilon = 1e-8
    weight_decay: Weight = 0.1

    def transform(self, decayed: Mask) -> optax.GradientTransformation:
        """Returns the gradient transformation, without the learning rate."""
        return optax.chain(
            optax.scale_by_adam(self.b1, self.b2, self.eps),
            optax.add_decayed_weights(self.weight_decay, mask=decayed),
        )


@dataclasses.dataclass(frozen=True)
class Adafactor(Ranged):
    """Adafactor (Shazeer & Stern, 1804.04235) without momentum, as T5, GShard and Switch use it.

    Attributes:
        decay_rate: Exponent of the decay rate ``1 - t ** -decay_rate`` of the second moment at step
            ``t``.
        clipping_threshold: Largest root mean square of an update.
        multiply_by_parameter_scale: True multiplies updates by the root mean square of the
            parameter.
        factored_from: Smallest side of a matrix whose second moment is factored into row and column
            statistics.
    """

    decay_rate: PositiveShare = 0.8
    clipping_threshold: Factor = 1.0
    multiply_by_parameter_scale: bool = True
    factored_from: Positive = 128

    def transform(self, decayed: Mask) -> optax.GradientTransformation:
        """Returns the gradient transformation, without the learning rate."""
        del decayed
        parts = [
            optax.scale_by_factored_rms(
                decay_rate=self.decay_rate, min_dim_size_to_factor=self.factored_from
            ),
            optax.clip_by_block_rms(self.clipping_threshold),
        ]
        if self.multiply_by_parameter_scale:
            parts.append(optax.scale_by_param_block_rms())
        return optax.chain(*parts)


@dataclasses.dataclass(frozen=True)
class Lion(Ranged):
    """Lion (Chen et al., 2302.06675), with weight decay on matrices only.

    The paper advises a learning rate 3 to 10 times below AdamW's, and as much more weight decay.

    Attributes:
        b1: Weight of the momentum in the update, whose sign is applied.
        b2: Decay rate of the momentum.
        weight_decay: Weight decay per step, multiplied by the learning rate.
    """

    b1: Chance = 0.9
    b2: Chance = 0.99
    weight_decay: Weight = 0.1

    def transform(self, decayed: Mask) -> optax.GradientTransformation:
        """Returns the gradient transformation, without the learning rate."""
        return optax.chain(
            optax.scale_by_lion(self.b1, self.b2),
            optax.add_decayed_weights(self.weight_decay, mask=decayed),
        )


@dataclasses.dataclass(frozen=True)
class SGD(Ranged):
    """Stochastic gradient descent with momentum, and with weight decay on matrices only.

    Attributes:
        momentum: Decay rate of the momentum; 0 disables it.
        nesterov: True looks ahead along the momentum.
        weight_decay: Weight decay per step, multiplied by the learning rate.
    """

    momentum: Chance = 0.9
    nesterov: bool = False
    weight_decay: Weight = 0.0

    def transform(self, decayed: Mask) -> optax.GradientTransformation:
        """Returns the gradient transformation, without the learning rate."""
        return optax.chain(
            optax.trace(self.momentum, self.nesterov),
            optax.add_decayed_weights(self.weight_decay, mask=decayed),
        )


@dataclasses.dataclass(frozen=True)
class Muon(Ranged):
    """Muon (Jordan et al. 2024) on projections, and AdamW on all other parameters.

    Each projection is orthogonalised by itself, also in stacks of experts and of scanned layers, so
    an expert gets the same update as a matrix outside a stack. Updates of projections are scaled to
    the typical root mean square of AdamW's updates (Liu et al., 2502.16982, equation 4), so both
    rules share the learning rate. AdamW updates embeddings, head, routers, norms and biases.

    Attributes:
        momentum: Decay rate of the momentum of projections.
        nesterov: True looks ahead along the momentum.
        iterations: Number of Newton-Schulz iterations.
        rms: Root mean square of the update of a projection, before the learning rate.
        b1: Decay rate of AdamW's first moment.
        b2: Decay rate of AdamW's second moment.
        eps: Number added to the root of AdamW's second moment.
        weight_decay: Weight decay per step of all matrices, multiplied by the learning rate.
    """

    momentum: Chance = 0.95
    nesterov: bool = True
    iterations: Positive = 5
    rms: Factor = 0.2
    b1: Chance = 0.9
    b2: Chance = 0.95
    eps: Epsilon = 1e-8
    weight_decay: Weight = 0.1

    def transform(self, decayed: Mask) -> optax.GradientTransformation:
        """Returns the gradient transformation, without the learning rate."""
        orthogonal = optax.chain(
            contrib.scale_by_muon(
                beta=self.momentum,
                nesterov=self.nesterov,
                ns_steps=self.iterations,
                weight_dimension_numbers=_matrix_axes,
            ),
            optax.stateless(lambda updates, _: _with_rms(updates, self.rms)),
        )
        adam = optax.scale_by_adam(self.b1, self.b2, self.eps)
        rules = {"projections": orthogonal, "others": adam}
        return optax.chain(
            optax.partition(rules, _projections),
            optax.add_decayed_weights(self.weight_decay, mask=decayed),
        )


Schedule: TypeAlias = (
    Constant | RSqrt | Cosine | CosineRestarts | Linear | WarmupStableDecay | ExponentialRise
)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Ranged):
    """The optimizer.

    Attributes:
        rule: Update rule, from gradients to updates.
        schedule: Schedule of the learning rate after the warm-up.
        learning_rate: Peak of the learning rate.
        warmup_steps: Number of steps in which the learning rate grows linearly from 0 to its peak.
        clip_norm: Largest global norm of the gradient; 0 disables clipping.
        expert_multiplier: Factor of the learning rate for the experts.
        router_multiplier: Factor of the learning rate for the routers.
        decay_routers: False leaves routers out of weight decay. Norms and biases never decay.
        decay_embeddings: False leaves the table of tokens out of weight decay, which is also the
            head if ``model.tie_embeddings``.
        ema_decay: Share of an exponential moving average of the parameters that each update keeps,
            such as 0.999; evaluation and generation read the average. 0 keeps no average.
        frozen: Groups of parameters that keep their first values and have no optimizer state: a
            part (``router``, ``experts``, ``shared``, ``attention``, ``embedding``, ``norms``), a
            layer (``layers/0``), or a part of a layer (``layers/0/experts``). Routers include their
            state between steps, such as the bias of loss-free balancing.
        expert_rates: A learning rate per expert, by the number of its tokens; ``None`` for one rate
            of all experts.
        frozen_experts: Number of experts of each MoE layer, the first ones, whose networks keep
            their first values; the other experts and all routers train.
    """

    rule: AdamW | Adafactor | Lion | SGD | Muon = AdamW()
    schedule: Schedule = Cosine()
    learning_rate: Factor = 1e-3
    warmup_steps: Natural = 100
    clip_norm: NonNegative = 1.0
    expert_multiplier: NonNegative = 1.0
    router_multiplier: NonNegative = 1.0
    decay_routers: bool = True
    decay_embeddings: bool = True
    ema_decay: Chance = 0.0
    frozen: tuple[str, ...] = ()
    expert_rates: ExpertRates | None = None
    frozen_experts: Natural = 0

    def decayed(self, params: Any) -> Any:
        """Returns ``params`` with True in place of each parameter with weight decay, else False.

        A parameter decays by its ``decayed``, or if it has two axes or more.
        """

        def one(param: nnx.Variable) -> nnx.Variable:
            metadata = param.get_metadata()
            axes = metadata["axes"]
            kept = self.decay_routers or "router" not in axes
            kept &= self.decay_embeddings or axes[:1] != ("vocab",)
            return param.replace(kept and metadata.get("decayed", len(axes) > 1))

        return map_variables(one, params)


def _projections(params: Any) -> Any:
    """Returns ``projections`` for matrices between features and stacks of them, else ``others``."""

    def one(param: nnx.Variable) -> nnx.Variable:
        return param.replace("projections" if is_projection(param) else "others")

    return map_variables(one, params)


def _with_rms(updates: Any, rms: float) -> Any:
    """Returns orthogonal updates with a root mean square; theirs is ``1 / sqrt(larger side)``."""

    def one(update: nnx.Variable) -> nnx.Variable:
        value = update.get_value()
        if isinstance(value, optax.MaskedNode):
            return update
        inputs, outputs = _sides(update)
        sides = (math.prod(value.shape[axis] for axis in axes) for axes in (inputs, outputs))
        return update.replace(value * (rms * math.sqrt(max(sides))))

    return map_variables(one, updates)


def _matrix_axes(params: Any) -> Any:
    """Returns the axes of the inputs and of the outputs of each projection.

    Other axes, of experts and of scanned layers, count separate matrices.
    """

    def one(param: nnx.Variable) -> nnx.Variable:
        value = param.get_value()
        if isinstance(value, optax.MaskedNode):
            return param
        return param.replace(contrib.MuonDimensionNumbers(*_sides(param)))

    return map_variables(one, params)


def _sides(param: nnx.Variable) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the axes of the inputs and of the outputs of a projection."""
    axes = without_experts(param.get_metadata()["axes"])
    count, inputs = param.get_value().ndim, number_of_inputs(axes)
    places = tuple(range(count - len(axes), count))
    return places[:inputs], places[inputs:]


def map_variables(function: Any, params: Any) -> Any:
    """Returns ``params`` with ``function`` applied to each ``nnx.Variable``."""
    return jax.tree.map(function, params, is_leaf=lambda x: isinstance(x, nnx.Variable))
