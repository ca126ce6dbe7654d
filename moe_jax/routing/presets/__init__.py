"""Published routers. A new preset needs a function that composes the parts, and a line below.

The decorator ``register`` adds a router from outside the package.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any, TypeVar

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
from moe_jax.routing.presets.recent_models import (
    cohere2_moe,
    deepseek_v4,
    deepseek_v4_hash,
    ernie4_5_moe,
    expert_threshold,
    gemma4,
    glm4_moe,
    kimi_k2,
    longcat_flash,
    minimax_m2,
    moe_plus_plus,
    phimoe,
    pi_balancing,
    quantile_balancing,
    remoe,
    token_rounding,
    zaya,
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

# Published routers first, then those that ``register`` adds.
PRESETS: list[Callable[..., Router]] = [
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
    glm4_moe,
    kimi_k2,
    minimax_m2,
    ernie4_5_moe,
    cohere2_moe,
    deepseek_v4,
    deepseek_v4_hash,
    moe_plus_plus,
    longcat_flash,
    gemma4,
    zaya,
    phimoe,
    quantile_balancing,
    pi_balancing,
    remoe,
    expert_threshold,
    token_rounding,
    random,
    forced,
]
_PUBLISHED = frozenset(function.__name__ for function in PRESETS)
_Preset = TypeVar("_Preset", bound=Callable[..., Router])


def register(function: _Preset) -> _Preset:
    """Makes a function a router by name, for ``preset`` and for configs of this process.

    Its parameters are the choices of the router: each needs a type and a default. Registering a
    name again replaces the function, as when a cell of a notebook runs twice.

    Args:
        function: returns a ``Router``; its name is the name of the router.

    Returns:
        The function.

    Raises:
        ConfigError: if a published router has the name, or a parameter has no type or no default.

    Examples:
        >>> import moe_jax as mj
        >>> from moe_jax.routing import Capacity, Router, Softmax, TopK
        >>> @mj.register_router
        ... def plain_top_k(k: int = 2, capacity_factor: float = 1.25) -> Router:
        ...     return Router(Softmax(), TopK(k), capacity=Capacity(capacity_factor))
        >>> mj.router("plain_top_k", k=1).select.k
        1

        It is a name for configs, too:

        >>> own = mj.experiment("quickstart", {"model.moe.router.preset": "plain_top_k"})
        >>> own.model.moe.router.select.k
        2
    """
    name = function.__name__
    if name in _PUBLISHED:
        raise ConfigError(f"{name!r} is a published router: give the function another name")
    for parameter in inspect.signature(function).parameters.values():
        if inspect.Parameter.empty in (parameter.annotation, parameter.default):
            raise ConfigError(
                f"parameter {parameter.name!r} of router {name!r} needs a type and a default, such "
                f"as {parameter.name}: float = 1.0"
            )
    PRESETS[:] = [*(other for other in PRESETS if other.__name__ != name), function]
    return function


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
    """Returns a router by name, published or registered, with some arguments changed.

    Args:
        name: Name of the router, such as ``switch``; ``moe_jax.routing.PRESETS`` lists the names.
        **choices: Arguments of the router that differ from its defaults, such as ``k`` or
            ``capacity_factor``.

    Raises:
        ConfigError: If the router or an argument does not exist, or a number is out of its range.

    Examples:
        A router maps the logits ``(S, E)`` of a group of tokens to a plan:

        >>> import jax
        >>> import moe_jax as mj
        >>> logits = jax.random.normal(jax.random.key(0), (16, 8))
        >>> plan = mj.router("deepseek_v3", k=4, groups=4, keep_groups=2)(logits)
        >>> plan.counts.load.sum().item()  # 16 tokens, 4 experts each
        64.0
        >>> plan.combine.shape == (*logits.shape, 16)  # dropless: a slot for every token
        True
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
