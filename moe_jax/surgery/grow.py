"""Adds experts, cuts experts into parts and widens experts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from moe_jax.errors import ConfigError
from moe_jax.routing import (
    Bias,
    Everyone,
    Linear,
    Router,
    Softmax,
    TopK,
    TwoLevelSoftmax,
    Uniform,
)
from moe_jax.surgery.mixture import UNITS, MixtureLayer, router_axes

_INPUTS = ("up", "gate")


@dataclasses.dataclass(frozen=True)
class Grown:
    """A layer with other experts.

    Attributes:
        mixture: The layer.
        follow: Function that gives other numbers of the old layer's arrays, such as moments of an
            optimizer, to the arrays of the new layer. It moves numbers without scaling them; new
            units get zeros. Arrays may be missing.
        reason: Reason for which the layer computes another function than the old layer; "" if it
            computes the same function without noise, up to rounding.
    """

    mixture: MixtureLayer
    follow: Callable[[MixtureLayer], MixtureLayer]
    reason: str = ""

    @property
    def exact(self) -> bool:
        """True if the layer computes the function of the old layer, up to rounding."""
        return not self.reason


def copied(mixture: MixtureLayer, factor: int) -> Grown:
    """Returns a layer with ``factor`` copies of each expert, of which a token chooses all.

    Copies have equal logits, so the best ``factor * k`` experts are the copies of the best ``k``.
    Each copy adds its part of the output. A token costs ``factor`` times as much.

    Args:
        mixture: The layer.
        factor: Number of copies of an expert, the expert included.

    Raises:
        ConfigError: If the router has no ``k``, or cannot work with so many experts.
    """
    wider, follow, reason = _with_more_choices(mixture, factor)
    outputs = 1 if _divides_gates(mixture.moe.router) else 1 / factor
    experts = {
        name: array * outputs if name.startswith("down") else array
        for name, array in wider.experts.items()
    }
    return Grown(dataclasses.replace(wider, experts=experts), follow, reason)


def split(mixture: MixtureLayer, factor: int) -> Grown:
    """Returns a layer in which each expert is cut into ``factor`` experts of equal width.

    A token chooses all parts of its ``k`` experts, so the sum of the parts is the expert. A token
    costs as much as before (fine-grained experts, DeepSeekMoE 2401.06066, section 3.1). If the
    router divides a gate among the parts, the output weights are multiplied by ``factor``.

    Args:
        mixture: The layer.
        factor: Number of parts, a divisor of the hidden width.

    Raises:
        ConfigError: If the parts do not divide the width, if the router has no ``k``, or if it
            cannot work with so many experts.
    """
    if factor < 1 or mixture.moe.expert_dim % factor:
        raise ConfigError(
            f"factor={factor} does not divide expert_dim={mixture.moe.expert_dim}: change factor"
        )
    wider, repeat, reason = _with_more_choices(mixture, factor)
    outputs = factor if _divides_gates(mixture.moe.router) else 1
    narrow = wider.with_settings(expert_dim=mixture.moe.expert_dim // factor)
    experts = _parts(mixture.experts, factor, outputs)

    def follow(other: MixtureLayer) -> MixtureLayer:
        cut = {name: _cut(name, array, factor) for name, array in other.experts.items()}
        return dataclasses.replace(repeat(other), experts=cut)

    return Grown(dataclasses.replace(narrow, experts=experts), follow, reason)


def _with_more_choices(
    mixture: MixtureLayer, factor: int
) -> tuple[MixtureLayer, Callable[[MixtureLayer], MixtureLayer], str]:
    """Returns the layer with each expert ``factor`` times, all chosen, and why gates differ.

    The function in between repeats the experts of other numbers.
    """
    if factor < 2:
        raise ConfigError(f"factor={factor} adds no expert: use at least 2")
    router = mixture.moe.router
    if not isinstance(router.select, TopK | Everyone):
        raise ConfigError(
            f"with select={type(router.select).__name__} a token cannot choose {factor} times as "
            "many experts, only with TopK and Everyone: add copies of single experts, or widen them"
        )
    index = np.repeat(np.arange(mixture.num_experts), factor)
    grown = mixture.take(index).with_settings(router=_wider_choice(router, factor))
    if "bias" in grown.state and _divides_gates(router, normalized=False):
        # The bias is added to scores, and these are divided among the copies.
        state = {**grown.state, "bias": grown.state["bias"] / factor}
        grown = dataclasses.replace(grown, state=state)
    return grown, functools.partial(MixtureLayer.take, experts=index), _difference(router)


def _wider_choice(router: Router, factor: int) -> Router:
    """Returns the router with ``factor`` times as many choices, and slots for them."""
    capacity, select = router.capacity, router.select
    if not (capacity.per_choice or capacity.dropless == "always" or capacity.devices):
        capacity = dataclasses.replace(
            capacity, factor=capacity.factor * factor, eval_factor=capacity.eval_factor * factor
        )
    if isinstance(select, TopK):
        select = dataclasses.replace(select, k=select.k * factor, skip=select.skip * factor)
    return dataclasses.replace(router, select=select, capacity=capacity)


def _divides_gates(router: Router, *, normalized: bool = True) -> bool:
    """Returns whether equal logits share a gate, so that more copies have smaller gates.

    Args:
        router: The router.
        normalized: False asks about the scores, before gates are divided by their sum.
    """
    score, select = router.score, router.select
    over_experts = isinstance(score, Softmax) and score.over == "experts"
    after = normalized and (
        router.capacity.renormalize or (isinstance(select, TopK) and select.normalize)
    )
    return after or over_experts or isinstance(score, TwoLevelSoftmax | Uniform)


def _difference(router: Router) -> str:
    """Returns why the copies of an expert are not chosen together with equal gates, or ""."""
    select, capacity = router.select, router.capacity
    rank = select.rank if isinstance(select, TopK) else None
    limit = select.limit if isinstance(select, TopK) else None
    differences = {
        f"{type(rank).__name__} ranks copies by more than scores": rank is not None
        and not isinstance(rank, Bias),
        "the two best experts of a group become copies": limit is not None
        and limit.excludes
        and limit.by == "top2",
        "experts without computation compete with more choices": router.free.count > 0,
        "gates multiply the inputs of the experts": router.gate_on == "in",
        "capacity.reroute gives a token one slot": capacity.reroute,
        "capacity.devices may drop one copy alone": capacity.devices > 0
        and capacity.dropless != "always",
        "capacity.rounding='share' rounds an even share up": capacity.rounding == "share"
        and capacity.dropless != "always",
    }
    return next((reason for reason, found in differences.items() if found), "")


def _parts(experts: Mapping[str, Array], factor: int, outputs: float) -> dict[str, Array]:
    """Returns the parts ``(E * factor, ...)`` of experts ``(E, ...)``, in the order of experts."""
    found = {}
    for name, array in experts.items():
        pieces = _cut(name, array, factor)
        # Every part adds its share of the output's bias.
        pieces = pieces if name in UNITS else pieces / factor
        found[name] = pieces * outputs if name.startswith("down") else pieces
    return found


def _cut(name: str, array: Array, factor: int) -> Array:
    """Returns the units ``(E * factor, ...)`` of each part; an array without units is repeated."""
    if name not in UNITS:
        return jnp.repeat(array, factor, axis=0)
    pieces = jnp.stack(jnp.split(array, factor, axis=UNITS[name]), axis=1)
    return pieces.reshape(-1, *pieces.shape[2:])


def with_copies(mixture: MixtureLayer, experts: Sequence[int]) -> Grown:
    """Returns the layer with one more copy of each listed expert, and ``k`` as before.

    Copies follow the old experts, or those of their group of neighbours if the router restricts a
    token to groups. A softmax would count the logit of a copied expert twice, so both
    logits fall by ``log 2`` if the head has a bias; ``Linear`` gets one. The function is kept if
    every token chooses every expert, and for one choice whose gate is 1 in any case.

    Args:
        mixture: The layer.
        experts: Indices of experts, each at most once.

    Raises:
        ConfigError: If an expert does not exist or is listed twice, or the router cannot work with
            so many experts.
    """
    wrong = [e for e in experts if not 0 <= e < mixture.num_experts]
    if wrong or not experts or len(set(experts)) < len(experts):
        raise ConfigError(
            f"copies={list(experts)}: list experts from 0 to {mixture.num_experts - 1}, each once"
        )
    router, select = mixture.moe.router, mixture.moe.router.select
    everyone = isinstance(select, Everyone) and isinstance(router.score, Softmax)
    follow = functools.partial(MixtureLayer.take, experts=_with_copies(mixture, experts))
    grown = follow(mixture)
    if everyone:
        if not isinstance(router.head, Linear):
            return Grown(grown, follow, "the logits of the copies have no bias")
        return Grown(_shared_logits(grown, experts, mixture.num_experts), follow)
    one = isinstance(select, TopK) and select.k == 1 and select.normalize
    if one and _alone(router):
        return Grown(grown, follow)
    return Grown(grown, follow, "a copy takes the place of another choice, or its gate")


def _with_copies(mixture: MixtureLayer, experts: Sequence[int]) -> list[int]:
    """Returns the index of each expert of the new layer in the old one."""
    size = mixture.num_experts // mixture.neighbour_groups
    return sorted([*range(mixture.num_experts), *experts], key=lambda expert: expert // size)


def _alone(router: Router) -> bool:
    """Returns whether a copy can change neither the best expert nor a slot."""
    select, capacity = router.select, router.capacity
    assert isinstance(select, TopK)
    grouped = select.neighbour_groups() > 1 or router.score.neighbour_groups() > 1
    plain = select.rank is None and not grouped and not router.free.count
    return plain and capacity.dropless == "always" and router.gate_on == "out"


def _shared_logits(grown: MixtureLayer, experts: Sequence[int], before: int) -> MixtureLayer:
    """Returns the layer with ``log 2`` taken from the logits of both copies of each expert."""
    twice = np.asarray([*experts, *range(before, grown.num_experts)])
    router = grown.moe.router
    assert isinstance(router.head, Linear)  # ``with_copies`` has checked it.
    head = dataclasses.replace(router.head, bias=True)
    shape = grown.router["kernel"].shape[1:]
    bias = grown.router.get("bias", jnp.zeros(shape, jnp.float32)).at[twice].add(-np.log(2.0))
    moe = dataclasses.replace(grown.moe, router=dataclasses.replace(router, head=head))
    return dataclasses.replace(grown, moe=moe, router={**grown.router, "bias": bias})


def widened(mixture: MixtureLayer, hidden: int, key: PRNGKeyArray) -> Grown:
    """Returns the layer with experts of a larger hidden width.

    The input weights of new hidden units have the deviation of the old input weights, and their
    output weights are zero, so that the function stays for every router (Net2Net 1511.05641 copies
    units instead).

    Args:
        mixture: The layer.
        hidden: New hidden width, above the old one.
        key: Random key of the new units.

    Raises:
        ConfigError: If the width is not above the old one.
    """
    before = mixture.moe.expert_dim
    if hidden <= before:
        raise ConfigError(f"hidden={hidden} is not above expert_dim={before}: use a larger width")

    def draw(name: str, array: Array, new: tuple[int, ...]) -> Array:
        if name not in _INPUTS:
            return jnp.zeros(new, array.dtype)
        own = jax.random.fold_in(key, sorted(mixture.experts).index(name))
        deviation = array.std(axis=(1, 2), keepdims=True)
        return deviation * jax.random.normal(own, new, array.dtype)

    wide = _with_units(mixture, hidden - before, draw)
    zeros = functools.partial(_with_units, units=hidden - before, draw=_zeros)
    return Grown(wide.with_settings(expert_dim=hidden), zeros)


def _zeros(name: str, array: Array, shape: tuple[int, ...]) -> Array:
    del name
    return jnp.zeros(shape, array.dtype)


def _with_units(
    mixture: MixtureLayer, units: int, draw: Callable[[str, Array, tuple[int, ...]], Array]
) -> MixtureLayer:
    """Returns the layer with more hidden units, whose numbers ``draw`` gives by name and shape."""
    experts = dict(mixture.experts)
    for name, array in mixture.experts.items():
        if name in UNITS:
            shape = list(array.shape)
            shape[UNITS[name]] = units
            new = draw(name, array, tuple(shape))
            experts[name] = jnp.concatenate([array, new], axis=UNITS[name])
    return dataclasses.replace(mixture, experts=experts)


def perturbed(mixture: MixtureLayer, noise: float, key: PRNGKeyArray) -> MixtureLayer:
    """Returns the layer with normal noise, by which copies part in training.

    Args:
        mixture: The layer.
        noise: Deviation of the noise on each array of experts and on the router's weights of each
            expert, relative to the deviation of the array.
        key: Random key.
    """
    axes = router_axes(mixture.moe.router, mixture.width, mixture.num_experts)
    of_experts = {name: array for name, array in mixture.router.items() if axes[name]}

    def noisy(arrays: Mapping[str, Array], first: int) -> dict[str, Array]:
        return {
            name: array
            + noise
            * array.std()
            * jax.random.normal(jax.random.fold_in(key, first + i), array.shape, array.dtype)
            for i, (name, array) in enumerate(sorted(arrays.items()))
        }

    experts, router = noisy(mixture.experts, 0), noisy(of_experts, len(mixture.experts))
    return dataclasses.replace(mixture, experts=experts, router={**mixture.router, **router})
