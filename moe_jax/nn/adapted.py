"""A weight with a trained low-rank sum (LoRA), which layers read as one array."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from moe_jax.nn.init import weight
from moe_jax.nn.projection import number_of_inputs, without_experts
from moe_jax.parallel import constrain_parameters
from moe_jax.precision import wide_einsum
from moe_jax.ranges import Factor, Positive, Ranged

_INPUTS, _OUTPUTS = "ijk", "opq"


@dataclasses.dataclass(frozen=True)
class LoRA(Ranged):
    """Low-rank adapters of the weights of a trained model (Hu et al. 2021, 2106.09685).

    Layers read a weight ``W (I, O)`` as ``W + alpha / rank * A B`` with trained ``A (I, rank)`` and
    ``B (rank, O)``. All other parameters and the state of routers keep their values. Each expert
    has an ``A`` and a ``B`` of its own.

    Attributes:
        rank: Rank of ``A B``.
        alpha: Numerator of the factor of ``A B``.
        groups: Groups of weights that get adapters, named as in ``optimizer.frozen``: a part
            (``experts``, ``shared``, ``attention``, ``router``), a layer (``layers/0``), or a part
            of a layer (``layers/0/experts``). Norms, biases, embedding and head get none.
    """

    rank: Positive = 8
    alpha: Factor = 16.0
    groups: tuple[str, ...] = ()


class Adapted(nnx.Module):
    """A weight ``W`` that layers read as ``W + s A B``.

    The product and the sum are computed in float32 where a layer reads the weight. ``B`` starts at
    zero, so the first values are those of ``W``.
    """

    def __init__(self, base: nnx.Param, lora: LoRA, keys: PRNGKeyArray):
        """Initialises ``lora_a (..., I, rank)`` and ``lora_b (..., rank, O)``.

        ``I`` and ``O`` stand for all input and output axes of the weight. The axis of experts, and
        before it the axis of layers that a scan stacks, are the leading axes of all three arrays.

        Args:
            base: Weight ``(..., I, O)``.
            lora: Rank and factor.
            keys: Keys ``(N,)`` of the ``N`` stacked layers, or the key of one layer.
        """
        names = base.get_metadata()["axes"]
        axes = without_experts(names)
        experts, count = names[: len(names) - len(axes)], number_of_inputs(axes)
        shape = base.get_value().shape[keys.ndim :]
        stacked, sizes = shape[: len(experts)], shape[len(experts) :]
        rank = "router" if "router" in axes else None  # as the axes of a router's other weights

        def drawn(key: PRNGKeyArray) -> tuple[nnx.Param, nnx.Param]:
            inputs = (*stacked, *sizes[:count], lora.rank), (*experts, *axes[:count], rank)
            outputs = (*stacked, lora.rank, *sizes[count:]), (*experts, rank, *axes[count:])
            a = weight(key, *inputs, fan_in=math.prod(sizes[:count]), scale=1.0)
            return a, nnx.Param(jnp.zeros(outputs[0], jnp.float32), axes=outputs[1])

        self.base = base
        self.lora_a, self.lora_b = (jax.vmap(drawn) if keys.ndim else drawn)(keys)
        ins, outs = _INPUTS[:count], _OUTPUTS[: len(axes) - count]
        self.product = f"...{ins}r,...r{outs}->...{ins}{outs}"
        self.factor = lora.alpha / lora.rank

    def __getitem__(self, index: Any) -> Float[Array, "*entries"]:
        """Returns ``W + s A B`` at an index of its entries, float32."""
        low_rank = wide_einsum(self.product, self.factor * self.lora_a[...], self.lora_b[...])
        return constrain_parameters(self.base.replace(self.base[...] + low_rank))[index]

    def merged(self) -> nnx.Variable:
        """Returns a parameter with the values that layers read."""
        return self.base.replace(self[...])
