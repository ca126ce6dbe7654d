"""Flags of commands that hold few experts on the device: ``--expert_bytes=2GB``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from absl import flags

from moe_jax.errors import ConfigError
from moe_jax.models import Model
from moe_jax.offload import (
    LeastRecentlyUsed,
    LeastStale,
    NextRouter,
    NoPrediction,
    Policy,
    Predictor,
    Traces,
)
from moe_jax.serving import Offload
from moe_jax.serving.offloading import experts_per_layer

_UNITS = {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}
_POLICIES: dict[str, type[Policy]] = {
    "least_stale": LeastStale,
    "lru": LeastRecentlyUsed,
}
# Each is a function of the number of experts of every MoE layer.
_PREDICTORS: dict[str, Callable[[Sequence[int]], Predictor]] = {
    "router": lambda experts: NextRouter(),
    "traces": Traces,
    "none": lambda experts: NoPrediction(),
}


def define(values: flags.FlagValues) -> None:
    """Defines the flags."""
    flags.DEFINE_string(
        "expert_bytes",
        "",
        "Largest size of the experts on the device, such as 2GB or 500MB; the others are in the "
        "memory of the host. By default all are on the device. A budget changes no token.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "expert_policy",
        "least_stale",
        list(_POLICIES),
        "Which expert leaves the device: one of a layer that the step has left behind "
        "(least_stale), or the one whose last use is the longest ago (lru).",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "expert_prefetch",
        "router",
        list(_PREDICTORS),
        "Which experts of the next layer load early: the choices of its router for the tokens "
        "of this layer (router), the experts that followed its choices before (traces), or "
        "none.",
        flag_values=values,
    )


def offload_of(given: flags.FlagValues, model: Model) -> Offload | None:
    """Returns the budget for the experts of a model, or ``None`` without one.

    Raises:
        ConfigError: If the budget is no size.
    """
    if not given.expert_bytes:
        return None
    predictor = _PREDICTORS[given.expert_prefetch](experts_per_layer(model))
    return Offload(size_of(given.expert_bytes), _POLICIES[given.expert_policy](), predictor)


def check(given: flags.FlagValues) -> None:
    """Checks the budget before a model is opened.

    Raises:
        ConfigError: If it is no size.
    """
    if given.expert_bytes:
        size_of(given.expert_bytes)


def size_of(text: str) -> int:
    """Returns the number of bytes of a size.

    Raises:
        ConfigError: If the text is no size.

    Examples:
        >>> from moe_jax.cli.offloading import size_of
        >>> size_of("1.5MB")
        1500000
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(kB|MB|GB|)", text)
    if found is None:
        raise ConfigError(f"--expert_bytes={text} is no size: write 2GB, 500MB, 64kB or a number")
    return int(float(found[1]) * _UNITS[found[2]])
