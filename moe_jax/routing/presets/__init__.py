"""Published routers. A new preset needs a function that composes the parts, and a line below."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any

from moe_jax import ranges
from moe_jax.errors import ConfigError, nearest
from moe_jax.routing.presets.experts_choose import (
    expert_choice,
    expert_choice_capped,
    expert_choice_mtf,
    soft_moe,
)
from moe_jax.routing.presets.open_models import (
    dbrx,
    deepseek_moe,
    deepseek_v2,
    deepseek_v3,
    gpt_oss,
    llama4,
    loss_free,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3_moe,
)
from moe_jax.routing.presets.others import (
    adaptive_top_p,
    base,
    forced,
    hash,
    hierarchical,
    jacobs_1991,
    noisy_top_k,
    random,
    sinkhorn,
)
from moe_jax.routing.presets.switch import (
    no_token_left_behind,
    switch,
    switch_max,
    switch_mtf,
    switch_t5x,
    vmoe,
)
from moe_jax.routing.presets.top2 import (
    fairseq_top1,
    fairseq_top2,
    glam,
    gshard,
    st_moe,
    top2_mtf,
    xmoe,
)
from moe_jax.routing.router import Router

PRESETS: tuple[Callable[..., Router], ...] = (
    jacobs_1991,
    noisy_top_k,
    hierarchical,
    gshard,
    glam,
    top2_mtf,
    switch,
    switch_mtf,
    switch_t5x,
    switch_max,
    no_token_left_behind,
    vmoe,
    st_moe,
    fairseq_top1,
    fairseq_top2,
    xmoe,
    base,
    sinkhorn,
    hash,
    expert_choice,
    expert_choice_capped,
    expert_choice_mtf,
    soft_moe,
    adaptive_top_p,
    mixtral,
    dbrx,
    olmoe,
    qwen2_moe,
    qwen3_moe,
    deepseek_moe,
    deepseek_v2,
    deepseek_v3,
    loss_free,
    llama4,
    gpt_oss,
    random,
    forced,
)


def choices_of(name: str, *, with_ranges: bool = False) -> dict[str, Any]:
    """Returns the arguments of a preset with their types.

    Args:
        name: Name of the preset; an unknown name has no arguments.
        with_ranges: True returns the types with their ranges.
    """
    known = {function.__name__: function for function in PRESETS}
    if name not in known:
        return {}
    if with_ranges:
        return ranges.declared(known[name])
    hints = typing.get_type_hints(known[name])
    return {choice: hint for choice, hint in hints.items() if choice != "return"}


def preset(name: str, **choices: float | int | str | bool) -> Router:
    """Returns the published router ``name`` with some arguments changed.

    Args:
        name: Name of the preset.
        **choices: Arguments of the preset that differ from its defaults.

    Raises:
        ConfigError: If the preset or an argument does not exist, or a number is out of its range.
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
    for choice, value in choices.items():
        ranges.check(choices_of(name, with_ranges=True)[choice], value, f"{name}.{choice}")
    return known[name](**choices)
