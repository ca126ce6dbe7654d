"""The table of implementations of attention, and the choice of one by platform and by needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from moe_jax.attend import blocks, cudnn, splash
from moe_jax.errors import ConfigError
from moe_jax.parallel import axis_size, platform

# The name of the setting, for messages.
SETTING = "model.attention_kernel"


@dataclasses.dataclass(frozen=True)
class Needs:
    """The properties of an attention that decide which implementations express it.

    Attributes:
        dtype: Type of queries, keys and values.
        heads: Number of query heads.
        kv_heads: Number of heads of keys and values.
        key_dim: Width of a key.
        value_dim: Width of a value.
        own: True if the keys are those of the queries' own tokens; False for a cache or a memory.
        relative: True if a bias of relative positions is added to the scores.
        sinks: True if the softmax has learned scores without values.
    """

    dtype: str
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    own: bool = True
    relative: bool = False
    sinks: bool = False


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One implementation of attention.

    Attributes:
        attend: Function of queries, keys, values, sinks, view and options.
        platforms: Platforms that run it; empty for all.
        lacks: Function of needs that returns the reason why it cannot express them, or ``""``.
    """

    attend: Callable[..., Any]
    platforms: tuple[str, ...]
    lacks: Callable[[Needs], str]


@dataclasses.dataclass(frozen=True)
class Choice:
    """The implementation of an attention.

    Attributes:
        name: Name of the implementation.
        instead_of: Implementation that the platform or the setting names and that does not run;
            ``""`` if it runs.
        reason: Reason why it does not run.
    """

    name: str
    instead_of: str = ""
    reason: str = ""


def _splash_lacks(needs: Needs) -> str:
    if needs.relative:
        return "it has no bias of relative positions"
    if not needs.own:
        return "it reads neither a cache nor a memory"
    if axis_size("length") > 1:
        return "it does not split queries over mesh.sequence"
    model = axis_size("heads")
    if needs.heads % model or needs.kv_heads % model:
        return f"mesh.model={model} does not divide {needs.heads} and {needs.kv_heads} heads"
    return ""


def _cudnn_lacks(needs: Needs) -> str:
    if needs.relative:
        return "it has no bias of relative positions"
    if not needs.own:
        return "it reads neither a cache nor a memory"
    if needs.sinks:
        return "it has no sinks"
    if needs.dtype != "bfloat16":
        return f"it multiplies bfloat16 and not {needs.dtype}"
    if needs.key_dim != needs.value_dim:
        return f"it needs one width, not keys of {needs.key_dim} and values of {needs.value_dim}"
    if needs.key_dim % 8 or needs.key_dim > 128:
        return f"it needs a width that is a multiple of 8 up to 128, not {needs.key_dim}"
    return ""


IMPLEMENTATIONS = {
    "blocks": Kernel(blocks.attend, (), lambda needs: ""),
    "cudnn": Kernel(cudnn.attend, ("gpu", "cuda"), _cudnn_lacks),
    "splash": Kernel(splash.attend, ("tpu",), _splash_lacks),
}
_OTHERWISE = "blocks"


def choose(kernel: str, needs: Needs) -> Choice:
    """Returns the implementation of an attention on the platform that is traced for.

    Args:
        kernel: Name of an implementation, or ``auto`` for the first one of the platform.
        needs: Properties of the attention.

    Returns:
        The named implementation, or ``blocks`` if it cannot express the needs or cannot run.
    """
    here = platform()
    if kernel == "auto":
        kernel = next((n for n, i in IMPLEMENTATIONS.items() if here in i.platforms), _OTHERWISE)
    found = IMPLEMENTATIONS[kernel]
    reason = found.lacks(needs)
    if found.platforms and here not in found.platforms:
        reason = f"it runs on {' or '.join(found.platforms[:1])} and not on {here}"
    return Choice(_OTHERWISE, kernel, reason) if reason else Choice(kernel)


def check(kernel: str, attentions: dict[str, Needs]) -> dict[str, Choice]:
    """Returns the implementation of every attention of a model, by the name of its layers.

    Args:
        kernel: Value of the setting.
        attentions: Properties of every attention.

    Raises:
        ConfigError: If the setting names an implementation that does not run.
    """
    choices = {name: choose(kernel, needs) for name, needs in attentions.items()}
    for name, choice in choices.items():
        if choice.reason and kernel != "auto":
            raise ConfigError(
                f"{SETTING}={kernel} cannot compute {name}: {choice.reason}; use auto or blocks"
            )
    return choices


def summary(choices: dict[str, Choice]) -> str:
    """Returns one line: the implementations of all attentions, and the reasons of fallbacks."""
    groups: dict[Choice, list[str]] = {}
    for name, choice in choices.items():
        groups.setdefault(choice, []).append(name)
    return "; ".join(_part(choice, names, len(choices)) for choice, names in groups.items())


def _part(choice: Choice, names: list[str], total: int) -> str:
    """Returns the part of the line for the attentions ``names`` of ``total``."""
    where = ""
    if len(names) < total:
        listed = names if len(names) <= 4 else [names[0], "...", names[-1]]
        where = f" in {len(names)} of {total} attentions ({', '.join(listed)})"
    why = f", not {choice.instead_of}: {choice.reason}" if choice.reason else ""
    return f"{choice.name}{where}{why}"
