"""Requirements of dispatch implementations on a layer, and the error that rejects a layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from moe_jax.errors import ConfigError
from moe_jax.routing import Router
from moe_jax.transport.dispatch import OnOutputs


@runtime_checkable
class Settings(Protocol):
    """The settings of a mixture-of-experts layer that decide how its tokens travel."""

    @property
    def transport(self) -> str:
        """Name of the transport that moves tokens into slots."""

    @property
    def exchange(self) -> str:
        """Name of the exchange that moves slots to the devices of their experts."""

    @property
    def exchange_buffer(self) -> float | None:
        """Rows that a device can receive, relative to an even share; ``None`` means all."""

    @property
    def router(self) -> Router:
        """Router of the layer."""

    @property
    def expert_dims(self) -> tuple[int, ...]:
        """Hidden widths of groups of experts; empty if all experts have one width."""

    @property
    def expert_dropout(self) -> float:
        """Dropout rate of the experts' outputs."""

    @property
    def expert_mask(self) -> float:
        """Probability that a token loses an expert's whole output."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """The facts about a layer and its mesh that requirements read.

    Attributes:
        settings: Settings of the layer.
        expert_shards: Number of devices over which the mesh splits the experts.
        same_width: True if the experts' outputs are as wide as tokens. Projections of attention
            have other widths.
    """

    settings: Settings
    expert_shards: int
    same_width: bool = True

    @property
    def worst_case(self) -> bool:
        """True if every expert has a slot for every token, of which most stay empty."""
        capacity, select = self.settings.router.capacity, self.settings.router.select
        return select.slots() is None and (capacity.dropless == "always" or capacity.devices > 0)


@dataclasses.dataclass(frozen=True)
class Requirement:
    """A condition on the layer or its mesh.

    Attributes:
        needed: Condition in words, for messages.
        name: Setting that decides the condition, as messages name it.
        value: Function that returns the value of the setting.
        met: Function that returns True if the condition holds.
    """

    needed: str
    name: str
    value: Callable[[Facts], Any]
    met: Callable[[Facts], bool]


def _select(facts: Facts) -> str:
    return type(facts.settings.router.select).__name__


SLOT_TABLE = Requirement(
    "slots that hold one token or none",
    "router.select",
    _select,
    lambda facts: facts.settings.router.select.slot_table,
)
TOKENS_CHOOSE = Requirement(
    "tokens that choose their experts",
    "router.select",
    _select,
    lambda facts: not facts.settings.router.select.experts_choose,
)
ONE_WIDTH = Requirement(
    "experts of one width",
    "expert_dims",
    lambda facts: facts.settings.expert_dims,
    lambda facts: not facts.settings.expert_dims,
)
NO_DROPOUT = Requirement(
    "expert outputs without dropout",
    "expert_dropout",
    lambda facts: facts.settings.expert_dropout,
    lambda facts: facts.settings.expert_dropout == 0,
)
NO_MASK = Requirement(
    "expert outputs without a mask",
    "expert_mask",
    lambda facts: facts.settings.expert_mask,
    lambda facts: facts.settings.expert_mask == 0,
)
ALL_EXPERTS_HERE = Requirement(
    "all experts on each device",
    "mesh.expert",
    lambda facts: facts.expert_shards,
    lambda facts: facts.expert_shards == 1,
)
SAME_WIDTH = Requirement(
    "expert outputs as wide as tokens",
    "experts",
    lambda facts: "networks" if facts.same_width else "projections of attention",
    lambda facts: facts.same_width,
)


def refusal(chosen: str, needed: str, name: str, value: Any, instead: str) -> ConfigError:
    """Returns the error of a requirement that is not met.

    Args:
        chosen: Settings that select the implementation.
        needed: Requirement in words.
        name: Setting that does not meet the requirement.
        value: Value of that setting.
        instead: Settings that select another implementation.
    """
    return ConfigError(
        f"{chosen} requires {needed}, but {name}={value}. Change {name}, or use {instead}."
    )


def check_no_outputs_by_slot(chosen: str, on_outputs: OnOutputs | None) -> None:
    """Rejects a function of outputs by slot for an implementation without such outputs.

    Raises:
        ConfigError: If ``on_outputs`` is not ``None``; ``chosen`` names the implementation.
    """
    if on_outputs is not None:
        raise refusal(chosen, NO_DROPOUT.needed, "on_outputs", on_outputs, "transport='gather'")
