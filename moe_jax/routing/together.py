"""Checks that the parts of a router work together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from moe_jax.errors import ConfigError
from moe_jax.routing.balance import Balance
from moe_jax.routing.capacity import Capacity
from moe_jax.routing.free import FreeExperts
from moe_jax.routing.select import Forced, Select


@dataclasses.dataclass(frozen=True)
class RouterParts:
    """The parts of a router that limit each other; see ``Router``."""

    select: Select
    balance: tuple[Balance, ...]
    capacity: Capacity
    free: FreeExperts
    redirect: tuple[int, ...]
    gate_on: Literal["out", "in"]


def check_parts(parts: RouterParts) -> None:
    """Rejects a router whose parts do not work together.

    Raises:
        ConfigError: If a part cannot work with another; the message names the setting to change.
    """
    _check_losses(parts)
    select = type(parts.select).__name__
    if parts.gate_on == "in" and parts.select.experts_choose:
        raise ConfigError(
            f"gate_on='in' needs tokens that choose experts: with select={select} use gate_on='out'"
        )
    if parts.capacity.reroute and parts.select.experts_choose:
        raise ConfigError("capacity.reroute needs tokens that choose experts: turn it off")
    if parts.free.count:
        _reject_first(
            _unfit_for_free(parts),
            "free experts take no slot, which this {0} does not know: remove free or change {0}",
        )
    if parts.redirect:
        _reject_first(
            _unfit_for_redirect(parts),
            "redirect adds up the choices of an expert, which this {0} does not know: remove "
            "redirect or change {0}",
        )


def _check_losses(parts: RouterParts) -> None:
    """Raises ``ConfigError`` if a loss needs other choices, or if two losses share a name."""
    select = type(parts.select).__name__
    for part in parts.balance:
        name = type(part).__name__
        if part.needs_token_choice and parts.select.experts_choose:
            raise ConfigError(
                f"{name} needs tokens that choose experts, but with select={select} experts "
                f"choose and the load is even by construction: remove {name} from balance"
            )
        if part.needs_second_choice and parts.select.choices(2) < 2:
            raise ConfigError(
                f"{name} needs second choices, but select={select} makes one choice: use Top2 "
                f"or TopK(2), or remove {name} from balance"
            )
    names = [part.name for part in parts.balance]
    if len(set(names)) < len(names):
        raise ConfigError(f"two losses share a name in balance: {', '.join(names)}; name one")


def _reject_first(unfit: Mapping[str, bool], message: str) -> None:
    """Raises ``ConfigError`` for the first setting that is unfit."""
    for setting in (name for name, is_unfit in unfit.items() if is_unfit):
        raise ConfigError(message.format(setting))


def _unfit_for_free(parts: RouterParts) -> dict[str, bool]:
    """Returns whether each setting cannot work with free experts."""
    return {
        "select": parts.select.experts_choose,
        "balance over='batch'": any(part.over == "batch" for part in parts.balance),
        "capacity.reroute": parts.capacity.reroute,
        "capacity.renormalize": parts.capacity.renormalize,
    }


def _unfit_for_redirect(parts: RouterParts) -> dict[str, bool]:
    """Returns whether each setting cannot work with several logits per expert."""
    several = parts.select.choices(len(parts.redirect)) > 1
    return {
        "select": parts.select.experts_choose or isinstance(parts.select, Forced),
        "free": parts.free.count > 0,
        "balance over='batch'": any(part.over == "batch" for part in parts.balance),
        "capacity.reroute": parts.capacity.reroute,
        "gate_on": parts.gate_on == "in" and several,
    }
