"""The table of all dispatch implementations with their settings, requirements and costs.

A new implementation needs a module with a ``Dispatch`` and one row of this table. The row decides
the values that the settings ``transport`` and ``exchange`` accept, the layers that are rejected,
the alternatives that messages suggest, and the costs that counting and planning use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal

from moe_jax.parallel import ALL_TO_ALL, GSPMD
from moe_jax.transport.dispatch import Dispatch
from moe_jax.transport.einsum import Einsum
from moe_jax.transport.gather import Gather
from moe_jax.transport.ragged import Ragged
from moe_jax.transport.ragged_exchange import RaggedExchange
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
            ``choices`` by an all-to-all of unequal parts, ``tokens`` by permutations around the
            ring, or ``nothing``.
    """

    computes: Literal["slots", "choices"] = "slots"
    products: bool = False
    sends: Literal["slots", "choices", "tokens", "nothing"] = "slots"


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One row of the table.

    Attributes:
        transport: Value of the setting ``transport`` that selects the implementation.
        exchange: Value of the setting ``exchange`` that selects the implementation.
        dispatch: Function that executes plans.
        requires: Conditions on the layer and its mesh.
        cost: Computation and communication of the implementation.
        reason: Reason why ``transport="auto"`` selects the implementation, for the log.
        suits: Function that returns True if ``transport="auto"`` may select the implementation.
        configure: Function that makes the dispatch from the settings of a layer, if it has any.
    """

    transport: str
    exchange: str
    dispatch: Dispatch
    requires: tuple[Requirement, ...] = ()
    cost: TransportCost = TransportCost()
    reason: str = ""
    suits: Callable[[Facts], bool] = lambda facts: False
    configure: Callable[[Settings], Dispatch] | None = None

    def configured(self, settings: Settings) -> Dispatch:
        """Returns the dispatch with the settings of a layer."""
        return self.dispatch if self.configure is None else self.configure(settings)

    def unmet(self, facts: Facts) -> Requirement | None:
        """Returns the first requirement that does not hold, or ``None``."""
        return next((each for each in self.requires if not each.met(facts)), None)


AUTO = "auto"
_NO_OUTPUTS_BY_SLOT = (ONE_WIDTH, NO_DROPOUT, NO_MASK)
_SORTED = (SLOT_TABLE, TOKENS_CHOOSE, *_NO_OUTPUTS_BY_SLOT)
_VISITS = (SLOT_TABLE, SAME_WIDTH, *_NO_OUTPUTS_BY_SLOT)
_PRODUCTS = TransportCost(products=True)

# The rows are in order of preference: a message suggests the first row that fits the layer, and
# ``auto`` selects the first that fits and suits it.
TABLE: tuple[Implementation, ...] = (
    Implementation(
        "ragged",
        "gspmd",
        Ragged(),
        (*_SORTED, ALL_EXPERTS_HERE),
        TransportCost(computes="choices", sends="nothing"),
        "no choice is dropped, and every device holds all experts",
        lambda facts: facts.worst_case,
    ),
    Implementation(
        "ragged",
        "ragged",
        RaggedExchange(),
        _SORTED,
        TransportCost(computes="choices", sends="choices"),
        "no choice is dropped, and the mesh splits the experts",
        lambda facts: facts.worst_case and facts.expert_shards > 1,
        configure=lambda settings: RaggedExchange(settings.exchange_buffer),
    ),
    Implementation("gather", "ring", Ring(), _VISITS, TransportCost(sends="tokens")),
    Implementation(
        "gather",
        "gspmd",
        InSlots(Gather(), GSPMD),
        (SLOT_TABLE,),
        reason="every slot holds one token or none",
        suits=lambda facts: True,
    ),
    Implementation("gather", "all_to_all", InSlots(Gather(), ALL_TO_ALL), (SLOT_TABLE,)),
    Implementation(
        "einsum",
        "gspmd",
        InSlots(Einsum(), GSPMD),
        (),
        _PRODUCTS,
        "slots hold mixtures of tokens",
        lambda facts: True,
    ),
    Implementation("einsum", "all_to_all", InSlots(Einsum(), ALL_TO_ALL), (), _PRODUCTS),
)

if TYPE_CHECKING:
    TransportName = str
    ExchangeName = str
    AnyWidthExchangeName = str
else:
    TransportName = Literal[(AUTO, *sorted({row.transport for row in TABLE}))]
    ExchangeName = Literal[tuple(sorted({row.exchange for row in TABLE}))]
    # Exchanges for experts whose outputs are not as wide as tokens.
    AnyWidthExchangeName = Literal[
        tuple(sorted({row.exchange for row in TABLE if SAME_WIDTH not in row.requires}))
    ]


def implementation(settings: Settings, expert_shards: int = 1) -> Implementation:
    """Returns the implementation that a layer's transport and exchange select.

    Args:
        settings: Settings of the layer.
        expert_shards: Number of devices over which the mesh splits the experts.

    Raises:
        ConfigError: If no implementation has this transport and this exchange.
    """
    return _selected(Facts(settings, expert_shards), "model.moe")


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
    """Returns the row with a layer's transport and exchange; ``auto`` selects a transport.

    Raises:
        ConfigError: If the table has no such row.
    """
    transport, exchange = facts.settings.transport, facts.settings.exchange
    if transport == AUTO:
        transport, exchange = _fastest(facts)
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


def _fastest(facts: Facts) -> tuple[str, str]:
    """Returns transport and exchange of the first row that fits and suits a layer.

    An exchange other than the default restricts the rows. If none of them fits, the first of them
    is returned, and ``check`` names its requirement.
    """
    exchange = facts.settings.exchange
    rows = [row for row in TABLE if row.exchange == exchange]
    if exchange == "gspmd":
        rows = [row for row in TABLE if row.suits(facts)]
    fitting = (row for row in rows if row.unmet(facts) is None)
    row = next(fitting, rows[0] if rows else TABLE[0])
    return row.transport, exchange if not rows else row.exchange


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
    settable = ("exchange",) if settings.transport == AUTO else ("transport", "exchange")
    names = (name for name in settable if getattr(settings, name) != getattr(row, name))
    return " with ".join(f"{name}={getattr(row, name)!r}" for name in names)


def _one_of(name: str, values: Iterable[str]) -> str:
    return f"{name}={' or '.join(repr(value) for value in dict.fromkeys(values))}"
