"""Updates of experts scaled by use, as an Optax transformation that keeps the mean use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from moe_jax.config.expert_rates import ExpertRates
from moe_jax.models import Model
from moe_jax.nn.moe import ConfiguredMoE

_EXPERTS = "experts"


class UseOfExperts(NamedTuple):
    """The use of experts so far.

    Attributes:
        updates: Number of updates, int32.
        tokens: Decayed sums of the numbers of tokens ``(*layers, E)``, by the name of the MoE layer
            in the parameters.
    """

    updates: Array
    tokens: dict[str, Array]


def use_of(model: Model, loads: Sequence[Float[Array, " E"]]) -> dict[str, Array]:
    """Returns the number of tokens of each expert, by the name of its MoE layer in the parameters.

    Args:
        model: The model.
        loads: Numbers of tokens ``(E,)`` of each MoE layer in order; scanned layers get one array.
    """
    of_router = {id(router): load for router, load in model.with_routers(loads)}
    return {
        "/".join(map(str, path)): of_router[id(module.router)]
        for path, module in nnx.iter_modules(model)
        if isinstance(module, ConfiguredMoE)
    }


def scale_by_use(rates: ExpertRates) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation that multiplies the update of each expert by a factor of its use.

    ``update`` takes the keyword ``use``, as from ``use_of``. Other updates stay as they are.

    Args:
        rates: Rule of the factors.
    """

    def init(params: Any) -> UseOfExperts:
        return UseOfExperts(jnp.int32(0), {n: jnp.zeros(s) for n, s in _shapes(params).items()})

    def update(
        updates: Any, state: UseOfExperts, params: Any = None, *, use: Mapping[str, Array], **_: Any
    ) -> tuple[Any, UseOfExperts]:
        count = state.updates + 1
        new = {
            name: rates.decay * sums + (1 - rates.decay) * use[name]
            for name, sums in state.tokens.items()
        }
        weight = 1 - jnp.float32(rates.decay) ** count
        factors = {name: rates.factors(sums / weight) for name, sums in new.items()}
        return _scaled(updates, factors), UseOfExperts(count, new)

    return optax.GradientTransformationExtraArgs(init, update)


class _ExpertsOfParameter(NamedTuple):
    """The experts that a parameter belongs to.

    Attributes:
        layer: Name of the MoE layer.
        first: Index of the first expert.
        shape: Sizes ``(*layers, E)`` of the stacked layers and of the experts from ``first`` on.
    """

    layer: str
    first: int
    shape: tuple[int, ...]


def _place(path: tuple[Any, ...], param: nnx.Variable) -> _ExpertsOfParameter | None:
    """Returns the experts of a parameter; ``None`` if it has none, or another optimizer has it."""
    axes, value = param.get_metadata()["axes"], param.get_value()
    if _EXPERTS not in path or axes[:1] != ("expert",) or isinstance(value, optax.MaskedNode):
        return None
    at, shape = path.index(_EXPERTS), value.shape[: value.ndim - len(axes) + 1]
    group = path[at + 2] if path[at + 1] == "groups" else 0  # of the experts of one width
    return _ExpertsOfParameter("/".join(map(str, path[:at])), group * shape[-1], shape)


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    """Returns the sizes ``(*layers, E)`` of each MoE layer with trained experts."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, param in nnx.to_flat_state(params):
        place = _place(path, param)
        if place is not None:
            experts = place.first + place.shape[-1]
            known = shapes.get(place.layer, (0,))[-1]
            shapes[place.layer] = (*place.shape[:-1], max(experts, known))
    return shapes


def _scaled(updates: Any, factors: Mapping[str, Array]) -> Any:
    """Returns updates in which each expert is multiplied by its factor."""

    def one(path: tuple[Any, ...], update: nnx.Variable) -> nnx.Variable:
        place = _place(path, update)
        if place is None:
            return update
        own = factors[place.layer][..., place.first : place.first + place.shape[-1]]
        value = update.get_value()
        return update.replace(value * own.reshape(own.shape + (1,) * (value.ndim - own.ndim)))

    flat = {path: one(path, update) for path, update in nnx.to_flat_state(updates)}
    return nnx.from_flat_state(flat)
