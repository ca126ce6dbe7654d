"""Each preset pins its published choices; what does not exist is refused by name."""

from __future__ import annotations

import dataclasses
import inspect
import typing

import pytest

from moe_jax.errors import ConfigError
from moe_jax.routing import (
    PRESETS,
    Capacity,
    LoadBalance,
    Router,
    SecondBalance,
    Softmax,
    TokenBalance,
    Top2,
    TopK,
    TopTokens,
    ZLoss,
    preset,
)

NAMES = [function.__name__ for function in PRESETS]

# Written out in full: a changed default of a part must not change a published router.
PUBLISHED = {
    "switch": Router(
        Softmax("experts"),
        TopK(1, normalize=False),
        (LoadBalance(1e-2, "first", "masked"),),
        Capacity(1.25, 2.0, 4, "ceil", False, "choice", False),
        input_jitter=1e-2,
    ),
    "switch_mtf": Router(
        Softmax("experts"),
        TopK(1, normalize=False),
        (LoadBalance(1e-2, "first", "counted"),),
        Capacity(1.25, 2.0, 4, "floor", False, "choice", False),
        input_jitter=1e-2,
    ),
    # Capacity 2N/(GE) with S = N/G: factor 2. Probability min(1, 2 * g2): threshold 1/2.
    "gshard": Router(
        Softmax("experts"),
        Top2("random", 0.5, lost_choices_queue=True),
        (LoadBalance(1e-2, "first", "masked"),),
        Capacity(2.0, 2.0, 1, "ceil", False, "choice", False),
    ),
    "top2_mtf": Router(
        Softmax("experts"),
        Top2("random", 0.2, lost_choices_queue=False),
        (LoadBalance(1e-2, "first", "diluted"),),
        Capacity(1.25, 2.0, 4, "floor", False, "choice", False),
    ),
    # k = n * c / e tokens per expert, no auxiliary loss.
    "expert_choice": Router(
        Softmax("experts"),
        TopTokens(average=False),
        (),
        Capacity(2.0, 2.0, 1, "floor", False, "choice", False),
    ),
    "expert_choice_mtf": Router(
        Softmax("tokens"),
        TopTokens(average=True),
        (TokenBalance(1e-2),),
        Capacity(1.25, 2.0, 4, "floor", False, "choice", False),
        input_jitter=1e-2,
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_preset_is_the_published_choice(name: str):
    assert name in PUBLISHED, "write out here what the new preset publishes"
    assert preset(name) == PUBLISHED[name]


@pytest.mark.parametrize("name", NAMES)
def test_presets_have_names_sources_and_hashes(name: str):
    function = {function.__name__: function for function in PRESETS}[name]
    assert function.__doc__
    assert preset(name) == function()
    hash(preset(name))


@pytest.mark.parametrize("name", NAMES)
def test_every_choice_changes_the_router(name: str):
    function = {function.__name__: function for function in PRESETS}[name]
    hints = typing.get_type_hints(function)
    for choice, parameter in inspect.signature(function).parameters.items():
        words = typing.get_args(hints[choice])
        for new in words or [parameter.default + 1]:
            same = preset(name, **{choice: new}) == preset(name)
            assert same == (new == parameter.default), (choice, new)


def test_choices_reach_their_parts():
    assert preset("switch", capacity_factor=1.0).capacity.factor == 1.0
    assert preset("switch", eval_capacity_factor=3.0).capacity.eval_factor == 3.0
    assert preset("switch", z_weight=1e-3).balance == (LoadBalance(1e-2), ZLoss(1e-3))
    assert preset("switch_mtf", priority="score").capacity.priority == "score"
    assert preset("gshard", second="none").select.second == "none"
    assert preset("top2_mtf", threshold=0.3).select.threshold == 0.3
    balance = preset("top2_mtf", second_balance_weight=5e-3).balance
    assert balance == (LoadBalance(1e-2, padding="diluted"), SecondBalance(5e-3))
    assert preset("expert_choice", over="tokens").score.over == "tokens"
    assert preset("expert_choice", z_weight=1e-3).balance == (ZLoss(1e-3),)


def test_loss_weights_go_by_name():
    router = preset("top2_mtf", balance_weight=0.5, second_balance_weight=0.25)
    assert router.loss_weights == {"balance": 0.5, "second_balance": 0.25}


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown router 'swich'; did you mean 'switch'") as e:
        preset("swich")
    assert "\n" not in str(e.value)
    assert all(name in str(e.value) for name in NAMES)


def test_unknown_choice_names_the_nearest():
    match = "router 'switch' has no choice 'capacity_facter'; did you mean 'capacity_factor'"
    with pytest.raises(ConfigError, match=match):
        preset("switch", capacity_facter=1.0)
    with pytest.raises(ConfigError, match="has no choice 'second'"):
        preset("switch", second="all")


def test_load_balance_with_experts_that_choose_is_refused():
    with pytest.raises(ConfigError, match="TopTokens.*LoadBalance.*even by construction"):
        dataclasses.replace(preset("expert_choice"), balance=(LoadBalance(),))


def test_second_balance_without_second_choices_is_refused():
    for name in ("switch", "expert_choice"):
        with pytest.raises(ConfigError, match="SecondBalance needs second choices"):
            dataclasses.replace(preset(name), balance=(SecondBalance(),))
