"""The interface of the auxiliary losses of routers, and their common sums and means."""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.errors import ConfigError
from moe_jax.ranges import Weight
from moe_jax.routing.inputs import Inputs, Scored
from moe_jax.routing.part import Part
from moe_jax.routing.select import Selection, TokenChoice

# Name of the router's state that has the choices (E,) of each expert in the whole batch.
BATCH_LOAD = "batch_load"


class Balance(Part, abc.ABC):
    """An unweighted loss of one group. A subclass is a frozen dataclass with a weight and a name.

    Attributes:
        weight: Factor in the objective.
        name: Name of the logged metric.
        span: Tokens over which one loss is computed: a ``group``, or a ``sequence``, which
            is a row of the batch with all documents packed into it. A router that is called on its
            own treats its input tokens as either.
        over: Tokens whose choices the loss counts: those of the ``span``, or of the whole
            ``batch``, which are in the state ``BATCH_LOAD``.
        balances: True if the loss is least for an even load.
        needs_token_choice: True if the loss reads the experts that each token chose.
        needs_second_choice: True if the loss reads second choices.
    """

    weight: Weight
    name: str
    span: str = "group"
    over: str = "span"
    balances = True
    needs_token_choice = False
    needs_second_choice = False

    def observe(self, scored: Scored, selection: Selection, inputs: Inputs) -> dict[str, Array]:
        """Returns sums over the tokens of a group that ``next_state`` reads; see ``Select``."""
        del scored, selection, inputs
        return {}

    @abc.abstractmethod
    def __call__(self, scored: Scored, selection: Selection, inputs: Inputs) -> Float[Array, ""]:
        """Returns the loss of one group, a scalar."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Evidence:
    """The arrays per token that losses read, to be gathered over sequences instead of groups.

    Attributes:
        logits: Logits ``(..., S, E)``, the first plane.
        scored: Scores of the tokens.
        choice: Experts that the tokens chose.
    """

    logits: Float[Array, "*G S E"]
    scored: Scored
    choice: TokenChoice


def token_choice(selection: Selection) -> TokenChoice:
    """Returns the selection as the choices of tokens.

    Raises:
        TypeError: If experts chose; ``Router`` rejects such a composition before.
    """
    if not isinstance(selection, TokenChoice):
        raise TypeError(f"the loss reads choices of tokens, not a {type(selection).__name__}")
    return selection


def per_token(choice: TokenChoice, inputs: Inputs) -> int | Int[Array, ""]:
    """Returns ``K``, the number of choices per token, or the top-k of this step."""
    return inputs.settings.get("top_k", choice.expert.shape[1])


def sent(
    choice: TokenChoice, num_experts: int, inputs: Inputs, choices: int | None = None
) -> Float[Array, "S E"]:
    """Returns 1 for each expert that a token chose among its first ``choices``, else 0.

    A choice that a random policy cancelled does not count. Choices of padding count, because some
    losses do not mask padding.
    """
    hits = choice.expert[..., None] == jnp.arange(num_experts)
    hits &= (choice.wanted | ~inputs.valid[:, None])[..., None]
    kept = inputs.kept(hits.shape[1])
    hits = hits if kept is None else hits & kept[:, None]
    return hits[:, :choices].sum(1).astype(choice.gate.dtype)


def by_device(per_expert: Float[Array, "*S E"], devices: int) -> Float[Array, "*S D"]:
    """Returns the sums ``(..., D)`` of ``(..., E)`` over the neighbouring experts of a device."""
    return per_expert.reshape(*per_expert.shape[:-1], devices, -1).sum(-1)


def check_devices(num_experts: int, devices: int, name: str) -> None:
    """Raises ``ConfigError`` if ``devices`` does not divide the number of experts."""
    if num_experts % devices:
        raise ConfigError(
            f"{name}: {num_experts} experts do not divide over devices={devices}: change devices"
        )


def mean_over(values: Float[Array, "S ..."], mask: Bool[Array, " S"]) -> Float[Array, "*E"]:
    """Returns the mean of ``values (S, ...)`` over tokens with ``mask (S,)``, 0 if none has it."""
    weight = mask.reshape(-1, *(1,) * (values.ndim - 1))
    return jnp.where(weight, values, 0).sum(0) / jnp.maximum(mask.sum(), 1)
