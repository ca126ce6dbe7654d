"""A new router is one file and a decorator, and every property holds for it unchanged."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from moe_jax import routing
from moe_jax.cli.main import main
from moe_jax.config.loading import experiment_of
from moe_jax.errors import ConfigError
from moe_jax.routing import Router
from tests.routing.cases import TRANSPORTS, case, names
from tests.routing.example_router import SecondBest, second_best
from tests.routing.helpers import select
from tests.routing.properties import ROUTING
from tests.transport.properties import TRANSPORT


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Registers ``second_best``, for the time of a test."""
    before = list(routing.PRESETS)
    routing.register(second_best)
    yield
    routing.PRESETS[:] = before


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


def test_it_is_a_name_for_configs():
    router = "model.moe.router"
    changes = {f"{router}.preset": "second_best", f"{router}.balance_weight": 0.5}
    # The capacity factors of the file stay, as far as the router has such choices.
    experiment = experiment_of("quickstart", changes)
    assert experiment.model.moe.router == second_best(1.25, balance_weight=0.5)


def test_a_command_of_the_same_process_knows_it(monkeypatch, capsys):
    router = "--config.model.moe.router.preset=second_best"
    monkeypatch.setattr(sys, "argv", ["moe-jax", "count", "quickstart", router])
    main()
    assert json.loads(capsys.readouterr().out)["name"] == "quickstart-switch"


def test_registering_again_replaces_the_function():
    def changed(capacity_factor: float = 4.0) -> Router:
        return second_best(capacity_factor)

    changed.__name__ = "second_best"
    routing.register(changed)
    assert names().count("second_best") == 1
    assert routing.preset("second_best").capacity.factor == 4


def test_a_function_that_cannot_be_a_name_is_refused():
    def switch() -> Router:
        return second_best()

    def untyped(capacity_factor=1.0) -> Router:
        return second_best(capacity_factor)

    def undecided(capacity_factor: float) -> Router:
        return second_best(capacity_factor)

    with pytest.raises(ConfigError, match="'switch' is a published router: give the function an"):
        routing.register(switch)
    for function in (untyped, undecided):
        with pytest.raises(ConfigError, match="'capacity_factor' of router .* needs a type and a"):
            routing.register(function)
