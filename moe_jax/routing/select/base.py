"""The interface of selections, and the choices that they return."""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32

from moe_jax.routing.inputs import Inputs, Scored
from moe_jax.routing.part import Part


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenChoice:
    """The experts that tokens chose; the capacity rule then assigns the choices to slots.

    A leading ``...`` stands for the group axis.

    Attributes:
        expert: Chosen experts ``(..., S, K)``, best first.
        gate: Combine weight ``(..., S, K)`` of the choice if it gets a slot.
        wanted: Mask ``(..., S, K)``, False for padding and for choices that a random policy
            cancelled.
        queued: Mask ``(..., S, K)`` of choices that occupy a position in their expert's queue,
            with or without a slot.
        log_gate: Finite logarithm ``(..., S, K)`` of ``gate``, up to one constant per group.
    """

    expert: Int32[Array, "*G S K"]
    gate: Float[Array, "*G S K"]
    wanted: Bool[Array, "*G S K"]
    queued: Bool[Array, "*G S K"]
    log_gate: Float[Array, "*G S K"]


@dataclasses.dataclass(frozen=True)
class ExpertChoice:
    """The tokens that experts chose, one per slot.

    Attributes:
        token: Chosen tokens ``(E, C)``.
        gate: Combine weights ``(E, C)``.
        filled: Mask ``(E, C)``, False if the slot is empty because too few tokens are valid.
    """

    token: Int32[Array, "E C"]
    gate: Float[Array, "E C"]
    filled: Bool[Array, "E C"]


@dataclasses.dataclass(frozen=True)
class SoftChoice:
    """The weights of slots that are weighted means of all tokens.

    Attributes:
        dispatch: Weights ``(S, E, C)`` of the tokens in each slot.
        combine: Weights ``(S, E, C)`` of the slots in each token.
    """

    dispatch: Float[Array, "S E C"]
    combine: Float[Array, "S E C"]


Selection = TokenChoice | ExpertChoice | SoftChoice


class Select(Part, abc.ABC):
    """The map from scores to choices. A subclass is a frozen dataclass.

    The class attributes describe the selection to the other parts and to the layer.

    Attributes:
        experts_choose: True if experts choose tokens, so that gates depend on later tokens.
        slot_table: True if a slot holds at most one token; otherwise only the ``einsum`` transport
            applies.
        needs_token_ids: True if the selection reads token ids.
    """

    experts_choose = False
    slot_table = True
    needs_token_ids = False

    @abc.abstractmethod
    def choices(self, num_experts: int) -> int:
        """Returns ``K``, the number of choices per token."""

    def expected_choices(self, num_experts: int) -> float:
        """Returns the mean number of choices per token that the router aims at, at most ``K``."""
        return float(self.choices(num_experts))

    def planes(self) -> int:
        """Returns the number of logits per token and expert that the selection reads."""
        return 1

    def neighbour_groups(self) -> int:
        """Returns the number of groups of neighbouring experts to which tokens are restricted."""
        return 1

    def slots(self) -> int | None:
        """Returns the number of slots per expert, or ``None`` if the capacity rule sets it."""
        return None

    def gate(self) -> str:
        """Returns a description of the combine weight, for the table of routers."""
        return "score"

    def observe(self, scored: Scored, selection: Selection, inputs: Inputs) -> dict[str, Array]:
        """Returns sums over the tokens of a group that ``next_state`` reads, besides the demand.

        They are added up over groups, devices and microbatches. Sums of integers do not depend on
        the order of the sum, so that the state is equal on any number of devices.
        """
        del scored, selection, inputs
        return {}

    @abc.abstractmethod
    def __call__(self, scored: Scored, inputs: Inputs) -> Selection:
        """Returns the choices of one group."""


def gate_in_words(normalize: bool, scale: float = 1.0) -> str:
    """Returns the description of the combine weight for selections by score."""
    gate = "score / sum over the chosen" if normalize else "score"
    return gate if scale == 1 else f"{scale:g} * {gate}"


def best(ranking: Float[Array, "S E"], k: int) -> Int32[Array, "S K"]:
    """Returns the ``k`` best experts ``(S, K)`` of every token, best first."""
    return jax.lax.top_k(jax.lax.stop_gradient(ranking), k)[1].astype(jnp.int32)


def at(scores: Float[Array, "S E"], expert: Int[Array, "S K"]) -> Float[Array, "S K"]:
    """Returns the scores ``(S, K)`` of the chosen experts."""
    return jnp.take_along_axis(scores, expert, axis=1)


def gates(
    scored: Scored,
    expert: Int[Array, "S K"],
    *,
    normalize: bool,
    kept: Bool[Array, " K"] | None = None,
) -> tuple[Float[Array, "S K"], Float[Array, "S K"]]:
    """Returns the gates ``(S, K)`` of the chosen experts and their logarithms.

    Args:
        scored: The scores.
        expert: Chosen experts ``(S, K)``.
        normalize: True divides the gates by their sum over ``K``. A softmax of the logarithms
            computes this for scores of any size.
        kept: Mask ``(K,)`` of the choices in this sum; ``None`` for all choices.
    """
    logs = at(scored.log_scores, expert)
    if kept is not None:
        logs = jnp.where(kept, logs, jnp.finfo(logs.dtype).min)
    if normalize:
        return jax.nn.softmax(logs, axis=-1), jax.nn.log_softmax(logs, axis=-1)
    return at(scored.scores, expert), logs


def every_choice(
    expert: Int32[Array, "S K"],
    gate: Float[Array, "S K"],
    valid: Bool[Array, " S"],
    log_gate: Float[Array, "S K"] | None = None,
    kept: Bool[Array, " K"] | None = None,
) -> TokenChoice:
    """Returns choices of which only padding's and those outside of ``kept`` are masked.

    Args:
        expert: Chosen experts ``(S, K)``.
        gate: Combine weights ``(S, K)``.
        valid: Mask ``(S,)``, False for padding.
        log_gate: Logarithm ``(S, K)`` of the combine weights. ``None`` computes it from ``gate``,
            which must then not be too small for its type.
        kept: Mask ``(K,)`` of the choices within the top-k of this step; ``None`` for all choices.
    """
    wanted = jnp.broadcast_to(valid[:, None], expert.shape)
    if kept is not None:
        wanted, gate = wanted & kept, jnp.where(kept, gate, 0)
    if log_gate is None:
        log_gate = jnp.log(jnp.maximum(gate, jnp.finfo(gate.dtype).tiny))
    return TokenChoice(expert, gate, wanted, wanted, log_gate)
