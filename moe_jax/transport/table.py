"""The one table of how tokens travel: each implementation, its settings, requirements and cost.

A new implementation is a module with a ``Dispatch`` and one line here. From the line follow the
values that the settings ``transport`` and ``exchange`` accept, the layers that are refused, what is
suggested instead, and what counting and planning reckon with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from moe_jax.parallel import ALL_TO_ALL, GSPMD
from moe_jax.transport.dispatch import Dispatch
from moe_jax.transport.einsum import Einsum
from moe_jax.transport.gather import Gather
from moe_jax.transport.ragged import Ragged
from moe_jax.transport.requirements import (
    ALL_EXPERTS_HERE,
    NO_DROPOUT,
    NO_MASK,
    ONE_WIDTH,
    SAME_WIDTH,
    SLOT_TABLE,
    TOKENS_CHOOSE,
    Facts,
    Requirement,
    Settings,
    refusal,
)
from moe_jax.transport.ring import Ring
from moe_jax.transport.slots import InSlots


@dataclasses.dataclass(frozen=True)
class Cost:
    """What an implementation computes and sends.

    Attributes:
        computes: rows that experts compute: all ``slots``, filled or not, or the ``choices``
            that got a slot.
        products: tokens travel by matrix products with ``(S, E C)`` tensors.
        sends: rows that cross the expert axis of the mesh, each way: ``slots`` by an all-to-all,
            ``tokens`` by permutations round the ring, or ``nothing``.
    """

    computes: Literal["slots", "choices"] = "slots"
    products: bool = False
    sends: Literal["slots", "tokens", "nothing"] = "slots"


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One line of the table.

    Attributes:
        transport: the value of the setting ``transport`` that selects it.
        exchange: the value of the setting ``exchange`` that selects it.
        dispatch: executes plans.
        requires: conditions on the layer and its mesh.
        cost: what it computes and sends.
    """

    transport: str
    exchange: str
    dispatch: Dispatch
    requires: tuple[Requirement, ...] = ()
    cost: Cost = Cost()

    def unmet(self, facts: Facts) -> Requirement | None:
        """Returns the first requirement that does not hold, or ``None``."""
        return next((each for each in self.requires if not each.met(facts)), None)


_NO_OUTPUTS_BY_SLOT = (ONE_WIDTH, NO_DROPOUT, NO_MASK)
_BLOCKS = (SLOT_TABLE, TOKENS_CHOOSE, *_NO_OUTPUTS_BY_SLOT, ALL_EXPERTS_HERE)
_VISITS = (SLOT_TABLE, SAME_WIDTH, *_NO_OUTPUTS_BY_SLOT)

# In order of preference: the first line that fits is suggested in place of one that does not.
TABLE: tuple[Implementation, ...] = (
    Implementation("ragged", "gspmd", Ragged(), _BLOCKS, Cost(computes="choices", sends="nothing")),
    Implementation("gather", "ring", Ring(), _VISITS, Cost(sends="tokens")),
    Implementation("gather", "gspmd", InSlots(Gather(), GSPMD), (SLOT_TABLE,)),
    Implementation("gather", "all_to_all", InSlots(Gather(), ALL_TO_ALL), (SLOT_TABLE,)),
    Implementation("einsum", "gspmd", InSlots(Einsum(), GSPMD), (), Cost(products=True)),
    Implementation("einsum", "all_to_all", InSlots(Einsum(), ALL_TO_ALL), (), Cost(products=True)),
)

if TYPE_CHECKING:
    TransportName = str
    ExchangeName = str
    AnyWidthExchangeName = str
else:
    TransportName = Literal[tuple(sorted({row.transport for row in TABLE}))]
    ExchangeName = Literal[tuple(sorted({row.exchange for row in TABLE}))]
    # Exchanges for experts whose outputs are not as wide as tokens.
    AnyWidthExchangeName = Literal[
        tuple(sorted({row.exchange for row in TABLE if SAME_WIDTH not in row.requires}))
    ]


def implementation(settings: Settings) -> Implementation:
    """Returns the implementation that a layer's transport and exchange select.

    Raises:
        ConfigError: if no implementation has this transport and this exchange.
    """
    return _selected(Facts(settings), "model.moe")


def check(
    settings: Settings,
    setting: str = "model.moe",
    expert_shards: int = 1,
    same_width: bool = True,
) -> None:
    """Refuses a layer whose transport and exchange do not go with its other settings or its mesh.

    Args:
        settings: the settings of the layer.
        setting: the path of these settings in the configuration, for messages.
        expert_shards: the number of devices over which the mesh splits the experts.
        same_width: whether the experts' outputs are as wide as tokens.

    Raises:
        ConfigError: one line that names the setting to change and an implementation that fits.
    """
    facts = Facts(settings, expert_shards, same_width)
    row = _selected(facts, setting)
    unmet = row.unmet(facts)
    if unmet is None:
        return
    chosen = f"{setting}.transport={row.transport!r}"
    if row.exchange != "gspmd":
        chosen += f" with exchange={row.exchange!r}"
    instead = _changes(settings, _suggested(facts))
    raise refusal(chosen, unmet.needed, unmet.name, unmet.value(facts), instead)


def _selected(facts: Facts, setting: str) -> Implementation:
    """Returns the line of a layer's transport and exchange; raises ``ConfigError`` without one."""
    transport, exchange = facts.settings.transport, facts.settings.exchange
    for row in TABLE:
        if (row.transport, row.exchange) == (transport, exchange):
            return row
    suggested = _suggested(facts)
    instead = _changes(facts.settings, suggested)
    transports = [row.transport for row in TABLE if row.exchange == exchange]
    if transports:
        chosen, needed = f"{setting}.exchange={exchange!r}", _one_of("transport", transports)
        raise refusal(chosen, needed, "transport", repr(transport), instead)
    exchanges = [row.exchange for row in TABLE if row.transport == suggested.transport]
    chosen, needed = f"{setting}.transport={transport!r}", _one_of("exchange", exchanges)
    raise refusal(chosen, needed, "exchange", repr(exchange), instead)


def _suggested(facts: Facts) -> Implementation:
    """Returns the first line that fits, if possible one of the layer's transport.

    On one shard of experts all exchanges do the same, so that none but the default is suggested.
    """
    fitting = [
        row
        for row in TABLE
        if row.unmet(facts) is None and (facts.expert_shards > 1 or row.exchange == "gspmd")
    ]
    same = (row for row in fitting if row.transport == facts.settings.transport)
    return next(same, fitting[0])


def _changes(settings: Settings, row: Implementation) -> str:
    """Returns in words the settings of a line that differ from those of the layer."""
    names = (
        name for name in ("transport", "exchange") if getattr(settings, name) != getattr(row, name)
    )
    return " with ".join(f"{name}={getattr(row, name)!r}" for name in names)


def _one_of(name: str, values: Iterable[str]) -> str:
    return f"{name}={' or '.join(repr(value) for value in dict.fromkeys(values))}"
