"""Published routers, each a choice of the four parts. Adding one is one function here."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any, Literal

from moe_jax.errors import ConfigError, nearest
from moe_jax.routing.balance import LoadBalance, SecondBalance, TokenBalance, ZLoss
from moe_jax.routing.capacity import Capacity
from moe_jax.routing.router import Router
from moe_jax.routing.score import Softmax
from moe_jax.routing.select import Top2, TopK, TopTokens


def switch(
    capacity_factor: float = 1.25,
    eval_capacity_factor: float = 2.0,
    balance_weight: float = 1e-2,
    z_weight: float = 0.0,
    input_jitter: float = 1e-2,
) -> Router:
    """Switch Transformer (Fedus et al. 2021, 2101.03961, section 2.2): top-1, raw gate."""
    return Router(
        score=Softmax(),
        select=TopK(1),
        balance=_losses(balance_weight, z_weight),
        capacity=Capacity(capacity_factor, eval_capacity_factor),
        input_jitter=input_jitter,
    )


def switch_mtf(
    capacity_factor: float = 1.25,
    eval_capacity_factor: float = 2.0,
    balance_weight: float = 1e-2,
    z_weight: float = 0.0,
    input_jitter: float = 1e-2,
    priority: Literal["choice", "score"] = "choice",
) -> Router:
    """The code the Switch paper cites (Mesh-TensorFlow): its capacity rule and padding."""
    balance = (LoadBalance(balance_weight, padding="counted"),)
    return Router(
        score=Softmax(),
        select=TopK(1),
        balance=balance + ((ZLoss(z_weight),) if z_weight else ()),
        capacity=Capacity(
            capacity_factor, eval_capacity_factor, rounding="floor", priority=priority
        ),
        input_jitter=input_jitter,
    )


def gshard(
    capacity_factor: float = 2.0,
    eval_capacity_factor: float = 2.0,
    balance_weight: float = 1e-2,
    z_weight: float = 0.0,
    second: Literal["all", "none", "threshold", "random"] = "random",
) -> Router:
    """GShard (Lepikhin et al. 2020, 2006.16668, Algorithm 1): top-2, random second expert.

    The balance loss is in Switch's normalisation: GShard's own value is this over ``E**2``.
    """
    return Router(
        score=Softmax(),
        select=Top2(second, threshold=0.5, lost_choices_queue=True),
        balance=_losses(balance_weight, z_weight),
        capacity=Capacity(capacity_factor, eval_capacity_factor, minimum=1),
    )


def top2_mtf(
    capacity_factor: float = 1.25,
    eval_capacity_factor: float = 2.0,
    balance_weight: float = 1e-2,
    second: Literal["all", "none", "threshold", "random"] = "random",
    threshold: float = 0.2,
    second_balance_weight: float = 0.0,
) -> Router:
    """Mesh-TensorFlow's top-2 gating: second expert kept with probability ``min(1, g2/0.2)``."""
    balance = [LoadBalance(balance_weight, padding="diluted")]
    if second_balance_weight:
        balance.append(SecondBalance(second_balance_weight))
    return Router(
        score=Softmax(),
        select=Top2(second, threshold),
        balance=tuple(balance),
        capacity=Capacity(capacity_factor, eval_capacity_factor, rounding="floor"),
    )


def expert_choice(
    capacity_factor: float = 2.0,
    eval_capacity_factor: float = 2.0,
    z_weight: float = 0.0,
    over: Literal["experts", "tokens"] = "experts",
) -> Router:
    """Expert Choice (Zhou et al. 2022, 2202.09368, section 3.2): experts take their top tokens."""
    return Router(
        score=Softmax(over),
        select=TopTokens(),
        balance=(ZLoss(z_weight),) if z_weight else (),
        capacity=Capacity(capacity_factor, eval_capacity_factor, minimum=1, rounding="floor"),
    )


def expert_choice_mtf(
    capacity_factor: float = 1.25,
    eval_capacity_factor: float = 2.0,
    balance_weight: float = 1e-2,
    z_weight: float = 0.0,
    input_jitter: float = 1e-2,
) -> Router:
    """Mesh-TensorFlow's expert selection: softmax over tokens, a token averages its experts."""
    z_loss = (ZLoss(z_weight),) if z_weight else ()
    return Router(
        score=Softmax("tokens"),
        select=TopTokens(average=True),
        balance=(TokenBalance(balance_weight), *z_loss),
        capacity=Capacity(capacity_factor, eval_capacity_factor, rounding="floor"),
        input_jitter=input_jitter,
    )


PRESETS: tuple[Callable[..., Router], ...] = (
    switch,
    switch_mtf,
    gshard,
    top2_mtf,
    expert_choice,
    expert_choice_mtf,
)


def choices_of(name: str) -> dict[str, Any]:
    """Returns the choices of a preset with their types; none if there is no such preset."""
    known = {function.__name__: function for function in PRESETS}
    hints = typing.get_type_hints(known[name]) if name in known else {}
    return {choice: hint for choice, hint in hints.items() if choice != "return"}


def preset(name: str, **choices: float | int | str | bool) -> Router:
    """Returns the published router ``name`` with the named ``choices`` changed.

    Raises:
        ConfigError: if the preset or one of the choices does not exist.
    """
    known = {function.__name__: function for function in PRESETS}
    if name not in known:
        raise ConfigError(f"unknown router {name!r}{nearest(name, known)}")
    parameters = inspect.signature(known[name]).parameters
    for choice in choices:
        if choice not in parameters:
            raise ConfigError(
                f"router {name!r} has no choice {choice!r}{nearest(choice, parameters)}"
            )
    return known[name](**choices)


def _losses(balance_weight: float, z_weight: float) -> tuple[LoadBalance | ZLoss, ...]:
    z_loss = (ZLoss(z_weight),) if z_weight else ()
    return (LoadBalance(balance_weight), *z_loss)
