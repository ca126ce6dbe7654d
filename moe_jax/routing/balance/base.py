"""The interface of the routers' losses."""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.errors import ConfigError
from moe_jax.ranges import Weight
from moe_jax.routing.inputs import Inputs, Scored
from moe_jax.routing.part import Part
from moe_jax.routing.select import Selection, TokenChoice

Array = jax.Array


class Balance(Part, abc.ABC):
    """A loss of one group, unweighted. A subclass is a frozen dataclass with a weight and a name.

    Attributes:
        weight: factor in the objective.
        name: under which it is logged.
        span: the tokens that one value of the loss is about: a ``group`` of the layer, or a
            ``sequence``, which is a row of the batch, with all documents packed into it. A router
            called on its own takes the tokens that it is given for either.
        needs_token_choice: reads the experts each token chose.
        needs_second_choice: reads second choices.
    """

    weight: Weight
    name: str
    span: str = "group"
    needs_token_choice = False
    needs_second_choice = False

    @abc.abstractmethod
    def __call__(self, scored: Scored, selection: Selection, inputs: Inputs) -> Array:
        """Returns the loss of one group, a scalar."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Evidence:
    """What losses of tokens that chose experts read of each token, to be gathered by another span.

    Attributes:
        logits: ``(..., S, E)``, the first plane.
        scored: the scores.
        choice: the choices.
    """

    logits: Array
    scored: Scored
    choice: TokenChoice


def sent(choice: TokenChoice, num_experts: int, valid: Array, choices: int | None = None) -> Array:
    """Returns ``(S, E)``: which experts each token chose, among its first ``choices``.

    Choices that a policy gave up do not count; those of padding do, for losses that do not mask it.
    """
    hits = choice.expert[..., None] == jnp.arange(num_experts)
    hits &= (choice.wanted | ~valid[:, None])[..., None]
    return hits[:, :choices].sum(1).astype(choice.gate.dtype)


def by_device(per_expert: Array, devices: int) -> Array:
    """Returns the sum over neighbouring experts ``(..., D)`` of ``(..., E)``."""
    return per_expert.reshape(*per_expert.shape[:-1], devices, -1).sum(-1)


def check_devices(num_experts: int, devices: int, name: str) -> None:
    """Raises ``ConfigError`` if the devices do not divide the experts."""
    if num_experts % devices:
        raise ConfigError(
            f"{name}: {num_experts} experts do not divide over devices={devices}: change devices"
        )


def mean_over(values: Array, mask: Array) -> Array:
    """Returns the mean of ``values (S, ...)`` over tokens with ``mask (S,)``, 0 without any."""
    weight = mask.reshape(-1, *(1,) * (values.ndim - 1))
    return jnp.where(weight, values, 0).sum(0) / jnp.maximum(mask.sum(), 1)
