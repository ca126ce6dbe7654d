"""A new router is one file and one line, and every property holds for it unchanged."""

from __future__ import annotations

import numpy as np
import pytest

from moe_jax import routing
from moe_jax.errors import ConfigError
from tests.routing.cases import TRANSPORTS, case, names
from tests.routing.example_router import SecondBest, second_best
from tests.routing.helpers import select
from tests.routing.properties import ROUTING
from tests.transport.properties import TRANSPORT


@pytest.fixture(autouse=True)
def one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line: ``second_best`` at the end of ``PRESETS``."""
    extended = (*routing.PRESETS, second_best)
    monkeypatch.setattr("moe_jax.routing.presets.PRESETS", extended)
    monkeypatch.setattr(routing, "PRESETS", extended)


def test_it_is_found_by_name_with_its_choices():
    assert names()[-1] == "second_best"
    assert routing.preset("second_best") == second_best()
    assert routing.preset("second_best", capacity_factor=2.0).capacity.factor == 2
    assert routing.choices_of("second_best") == {
        "capacity_factor": float,
        "balance_weight": float,
    }
    with pytest.raises(ConfigError, match="'second_bets'; did you mean 'second_best'"):
        routing.preset("second_bets")


def test_it_does_what_it_says():
    choice = select(SecondBest(), [[0.6, 0.3, 0.1], [0.1, 0.5, 0.4]])
    np.testing.assert_array_equal(choice.expert, [[1], [2]])
    np.testing.assert_allclose(choice.gate, [[0.3], [0.4]])


@pytest.mark.parametrize("title", ROUTING)
def test_every_routing_property_holds(title: str):
    ROUTING[title].check(case("second_best"))


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("title", [title for title in TRANSPORT if title != "one_expert_is_dense"])
def test_every_transport_property_holds(title: str, transport: str):
    if transport in TRANSPORT[title].transports:
        TRANSPORT[title].check(case("second_best"), TRANSPORTS[transport])


def test_one_expert_is_refused_by_name():
    with pytest.raises(ConfigError, match="SecondBest needs 2 experts"):
        routing.preset("second_best").check(1)
