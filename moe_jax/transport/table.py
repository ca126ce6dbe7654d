"""The table of all dispatch implementations with their settings, requirements and costs.

A new implementation needs a module with a ``Dispatch`` and one row of this table. The row decides
the values that the settings ``transport`` and ``exchange`` accept, the layers that are rejected,
the alternatives that messages suggest, and the costs that counting and planning use.
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
class TransportCost:
    """The computation and the communication of an implementation.

    Attributes:
        computes: Rows that experts compute: all ``slots``, filled or empty, or only the
            ``choices`` that got a slot.
        products: True if tokens are dispatched by matrix products with ``(S, E C)`` tensors.
        sends: Rows that cross the expert axis of the mesh, each way: ``slots`` by an all-to-all,
            ``tokens`` by permutations around the ring, or ``nothing``.
    """

    computes: Literal["slots", "choices"] = "slots"
    products: bool = False
    sends: Literal["slots", "tokens", "nothing"] = "slots"


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One row of the table.

    Attributes:
        transport: Value of the setting ``transport`` that selects the implementation.
        exchange: Value of the setting ``exchange`` that selects the implementation.
        dispatch: Function that executes plans.
        requires: Conditions on the layer and its mesh.
        cost: Computation and communication of the implementation.
    """

    transport: str
    exchange: str
    dispatch: Dispatch
    requires: tuple[Requirement, ...] = ()
    cost: TransportCost = TransportCost()

    def unmet(self, facts: Facts) -> Requirement | None:
        """Returns the first requirement that does not hold, or ``None``."""
        return next((each for each in self.requires if not each.met(facts)), None)


_NO_OUTPUTS_BY_SLOT = (ONE_WIDTH, NO_DROPOUT, NO_MASK)
_BLOCKS = (SLOT_TABLE, TOKENS_CHOOSE, *_NO_OUTPUTS_BY_SLOT, ALL_EXPERTS_HERE)
_VISITS = (SLOT_TABLE, SAME_WIDTH, *_NO_OUTPUTS_BY_SLOT)

# The rows are in order of preference: a message suggests the first row that fits the layer.
TABLE: tuple[Implementation, ...] = (
    Implementation(
        "ragged", "gspmd", Ragged(), _BLOCKS, TransportCost(computes="choices", sends="nothing")
    ),
    Implementation("gather", "ring", Ring(), _VISITS, TransportCost(sends="tokens")),
    Implementation("gather", "gspmd", InSlots(Gather(), GSPMD), (SLOT_TABLE,)),
    Implementation("gather", "all_to_all", InSlots(Gather(), ALL_TO_ALL), (SLOT_TABLE,)),
    Implementation("einsum", "gspmd", InSlots(Einsum(), GSPMD), (), TransportCost(products=True)),
    Implementation(
        "einsum", "all_to_all", InSlots(Einsum(), ALL_TO_ALL), (), TransportCost(products=True)
    ),
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
        ConfigError: If no implementation has this transport and this exchange.
    """
    return _selected(Facts(settings), "model.moe")


def check(
    settings: Settings,
    setting: str = "model.moe",
    expert_shards: int = 1,
    same_width: bool = True,
) -> None:
    """Rejects a layer whose other settings or mesh do not fit its transport and exchange.

    Args:
        settings: Settings of the layer.
        setting: Path of these settings in the configuration, for messages.
        expert_shards: Number of devices over which the mesh splits the experts.
        same_width: True if the experts' outputs are as wide as tokens.

    Raises:
        ConfigError: If a requirement is not met. The message names the setting to change and an
            implementation that fits.
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
    """Returns the row with a layer's transport and exchange.

    Raises:
        ConfigError: If the table has no such row.
    """
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
    """Returns the first row that fits, if possible a row with the layer's transport.

    With one expert shard all exchanges are equal, so only the default exchange is suggested.
    """
    fitting = [
        row
        for row in TABLE
        if row.unmet(facts) is None and (facts.expert_shards > 1 or row.exchange == "gspmd")
    ]
    same = (row for row in fitting if row.transport == facts.settings.transport)
    return next(same, fitting[0])


def _changes(settings: Settings, row: Implementation) -> str:
    """Returns in words the settings that differ between a row and the layer."""
    names = (
        name for name in ("transport", "exchange") if getattr(settings, name) != getattr(row, name)
    )
    return " with ".join(f"{name}={getattr(row, name)!r}" for name in names)


def _one_of(name: str, values: Iterable[str]) -> str:
    return f"{name}={' or '.join(repr(value) for value in dict.fromkeys(values))}"
