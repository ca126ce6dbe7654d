"""An exponential moving average of the parameters, kept in the state of the optimizer.

The average is part of the optimizer's state, so it is sharded as the parameters, saved in
checkpoints, and unchanged by a skipped update.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moe_jax.training.frozen import kept_now
from moe_jax.training.state import TrainState

_AVERAGE, _PARAMS = "/average/", "params/"


class Average(NamedTuple):
    """The average of the parameters.

    Attributes:
        updates: Number of updates, int32.
        average: Averaged parameters, with the structure of the parameters.
    """

    updates: jax.Array
    average: Any


def keep_average(decay: float) -> optax.GradientTransformation:
    """Returns the last transformation of an optimizer, which keeps an average of the parameters.

    After update ``t`` (from 1) the average is ``d * average + (1 - d) * parameters``, where ``d``
    is ``decay``, but at most ``t / (9 + t)``, so that the first parameters are soon forgotten. The
    transformation returns the updates unchanged. The average of a parameter that is frozen now, by
    the keyword ``frozen`` of ``update``, goes on towards its value and then keeps its bits.

    Args:
        decay: Share of the average that an update keeps, at least 0 and below 1.
    """

    def init(params: Any) -> Average:
        # A copy, because the caller donates the parameters and the average.
        return Average(jnp.int32(0), jax.tree.map(jnp.copy, params))

    def update(
        updates: Any,
        state: Average,
        params: Any = None,
        *,
        frozen: Mapping[str, jax.Array] | None = None,
        **_: Any,
    ) -> tuple[Any, Average]:
        count, old = state.updates + 1, state.average
        kept = jnp.minimum(decay, count / (9 + count))
        after = optax.apply_updates(params, updates)
        new = optax.incremental_update(after, old, 1 - kept)
        if frozen:
            # Rounding would move an average away from a value that it has reached.
            reached = jax.tree.map(lambda a, p, n: jnp.where(a == p, a, n), old, after, new)
            new = kept_now(new, reached, frozen, "params")
        return updates, Average(count, new)

    return optax.GradientTransformationExtraArgs(init, update)


def with_average(state: TrainState) -> TrainState:
    """Returns a state with the averaged parameters, or unchanged if the run keeps no average."""
    parts = jax.tree.leaves(state.opt_state, is_leaf=lambda part: isinstance(part, Average))
    averages = [part.average for part in parts if isinstance(part, Average)]
    if not averages:
        return state
    return dataclasses.replace(state, params=_over(state.params, averages[0]))


def _over(params: Any, average: Any) -> Any:
    """Returns the average, and the parameters themselves where they are frozen."""
    return jax.tree.map(lambda p, a: p if isinstance(a, optax.MaskedNode) else a, params, average)


def averaged_names(names: Iterable[str]) -> dict[str, str]:
    """Returns for each array of a state the name of the array that evaluation reads instead.

    Args:
        names: Names of the arrays of a state, as in ``moe_jax.training.state.named_leaves``.
    """
    names = list(names)
    averages = {
        _PARAMS + name.partition(_AVERAGE)[2]: name
        for name in names
        if name.startswith("opt_state/") and _AVERAGE in name
    }
    return {name: averages.get(name, name) for name in names}
