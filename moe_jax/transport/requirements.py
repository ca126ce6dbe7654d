"""What an implementation of dispatch may require of a layer, and the line that refuses a layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

from moe_jax.errors import ConfigError
from moe_jax.routing import Router
from moe_jax.transport.dispatch import OnOutputs


class Settings(Protocol):
    """The settings of a mixture-of-experts layer that decide how its tokens travel."""

    @property
    def transport(self) -> str:
        """How tokens reach slots."""

    @property
    def exchange(self) -> str:
        """How slots reach the devices of their experts."""

    @property
    def router(self) -> Router:
        """The router."""

    @property
    def expert_dims(self) -> tuple[int, ...]:
        """Widths of groups of experts, if experts have several widths."""

    @property
    def expert_dropout(self) -> float:
        """Dropout rate of the experts' outputs."""

    @property
    def expert_mask(self) -> float:
        """Chance that a token loses an expert's whole output."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """What requirements read.

    Attributes:
        settings: the settings of the layer.
        expert_shards: the number of devices over which the mesh splits the experts.
        same_width: whether the experts' outputs are as wide as tokens; those of projections are
            not.
    """

    settings: Settings
    expert_shards: int = 1
    same_width: bool = True


@dataclasses.dataclass(frozen=True)
class Requirement:
    """A condition on the layer or its mesh.

    Attributes:
        needed: the condition in words, for messages.
        name: the setting that decides it, as messages name it.
        value: returns the value of the setting.
        met: returns whether the condition holds.
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
        chosen: the settings that select the implementation.
        needed: the requirement in words.
        name: the setting that does not meet it.
        value: the value of that setting.
        instead: settings that select another implementation.
    """
    return ConfigError(
        f"{chosen} requires {needed}, but {name}={value}. Change {name}, or use {instead}."
    )


def check_no_outputs_by_slot(chosen: str, on_outputs: OnOutputs | None) -> None:
    """Raises ``ConfigError`` if a function of outputs by slot is given, which ``chosen`` lacks."""
    if on_outputs is not None:
        raise refusal(chosen, NO_DROPOUT.needed, "on_outputs", on_outputs, "transport='gather'")
