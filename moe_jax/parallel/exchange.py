"""Between a device's groups and a device's experts: one all-to-all of the slots each way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from moe_jax.parallel.mesh import AXES
from moe_jax.parallel.rules import axis_size, constrain, spec

Array = jax.Array
# All but tensor parallelism, which stays XLA's.
_MANUAL = frozenset(AXES) - {"model"}


class Exchange(Protocol):
    """Moves slots between the devices of their groups and those of their experts."""

    def to_experts(self, x: Array) -> Array:
        """``(G, E, C, M)`` to ``(E, G * C, M)``, slots in an order of its own."""

    def to_groups(self, y: Array, groups: int) -> Array:
        """Undoes ``to_experts``."""


def group_shards() -> int:
    """Returns over how many shards the groups are split on the mesh in force."""
    return axis_size("group")


def over_groups(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs ``function`` on each device's groups alone: its arrays all start with ``G``.

    For what treats every group by itself, such as routing. XLA cannot split ``top_k`` over a batch
    axis and would gather the scores of all groups on every device.
    """
    if group_shards() == 1:
        return function
    return on_devices(function, spec("group"), spec("group"))


def over_batch(function: Callable[..., Any], module: Any, *arrays: Array) -> Any:
    """Runs ``function(module, *arrays)`` on each device's tokens; arrays start with ``(B, L)``.

    The gradient of ``module`` is then summed over devices once. In a loop, XLA sums it at every
    turn.
    """
    batch, length = (axis_size(name) for name in ("batch", "length"))
    shape = arrays[0].shape
    if batch * length == 1 or shape[0] % batch or shape[1] % length:
        return function(module, *arrays)
    tokens = spec("batch", "length")
    return on_devices(function, (PartitionSpec(), *(tokens for _ in arrays)), tokens)(
        module, *arrays
    )


def on_each_device(function: Callable[..., Any], module: Any, *groups: Any) -> Any:
    """Runs ``function(module, *groups)`` on each device's groups, with the whole of ``module``.

    Args:
        function: its result starts with ``G`` too.
        module: gathered where it is split.
        groups: arrays, or trees of arrays, that start with ``G``.
    """
    if group_shards() == 1:
        return function(module, *groups)
    arguments = (PartitionSpec(), *(spec("group") for _ in groups))
    return on_devices(function, arguments, spec("group"))(module, *groups)


def on_devices(function: Callable[..., Any], arguments: Any, result: Any) -> Callable[..., Any]:
    """Runs ``function`` on what each device holds; see ``jax.shard_map`` for the partitions."""
    # Loops inside start from constants, which the check would want marked as differing by device.
    return jax.shard_map(
        function, in_specs=arguments, out_specs=result, axis_names=_MANUAL, check_vma=False
    )


class Gspmd:
    """The all-to-all as a transpose that XLA partitions (GShard section 3.3).

    XLA emits exactly one all-to-all for this form: split the group and expert axes into (shard,
    rest), swap the two shard axes, and pin the expert mesh axis to the first before the swap and to
    the second after it. Constraining less, such as the expert axis alone, adds all-gathers.
    """

    def to_experts(self, x: Array) -> Array:
        """Moves ``(G, E, C, M)`` to ``(E, G * C, M)``."""
        groups, experts, capacity, width = x.shape
        if group_shards() == 1:
            return x.swapaxes(0, 1).reshape(experts, groups * capacity, width)
        replicas, shards, parts = _shards()
        x = x.reshape(replicas, shards, parts, -1, shards, experts // shards, capacity, width)
        x = constrain(x, "replica", "expert", "length")
        x = constrain(jnp.swapaxes(x, 1, 4), "replica", "expert", "length")
        x = x.transpose(1, 5, 0, 2, 4, 3, 6, 7).reshape(experts, groups * capacity, width)
        return constrain(x, "expert", "slots")

    def to_groups(self, y: Array, groups: int) -> Array:
        """Moves ``(E, G * C, M)`` to ``(G, E, C, M)``."""
        experts, slots, width = y.shape
        capacity = slots // groups
        if group_shards() == 1:
            return y.reshape(experts, groups, capacity, width).swapaxes(0, 1)
        replicas, shards, parts = _shards()
        y = constrain(y, "expert", "slots")
        y = y.reshape(shards, experts // shards, replicas, parts, shards, -1, capacity, width)
        y = constrain(y.transpose(2, 0, 3, 5, 4, 1, 6, 7), "replica", "expert", "length")
        y = constrain(jnp.swapaxes(y, 1, 4), "replica", "expert", "length")
        return constrain(y.reshape(groups, experts, capacity, width), "group")


def _shards() -> tuple[int, int, int]:
    return axis_size("replica"), axis_size("expert"), axis_size("length")


class AllToAll:
    """The all-to-all said outright: ``jax.lax.all_to_all`` on what each device holds."""

    def to_experts(self, x: Array) -> Array:
        """Moves ``(G, E, C, M)`` to ``(E, G * C, M)``."""
        if group_shards() == 1:
            return GSPMD.to_experts(x)

        def local(x: Array) -> Array:
            x = jax.lax.all_to_all(x, "expert", split_axis=1, concat_axis=0, tiled=True)
            groups, experts, capacity, width = x.shape
            return x.swapaxes(0, 1).reshape(experts, groups * capacity, width)

        return on_devices(local, spec("group"), spec("expert", "slots"))(x)

    def to_groups(self, y: Array, groups: int) -> Array:
        """Moves ``(E, G * C, M)`` to ``(G, E, C, M)``."""
        if group_shards() == 1:
            return GSPMD.to_groups(y, groups)
        capacity, here = y.shape[1] // groups, groups // axis_size("slots")

        def local(y: Array) -> Array:
            y = y.reshape(y.shape[0], here, capacity, y.shape[-1]).swapaxes(0, 1)
            return jax.lax.all_to_all(y, "expert", split_axis=0, concat_axis=1, tiled=True)

        return on_devices(local, spec("expert", "slots"), spec("group"))(y)


GSPMD, ALL_TO_ALL = Gspmd(), AllToAll()


def around_the_ring(
    work: Callable[[Any, Array, Any], Array], experts: Any, tokens: Array, tables: Any
) -> Array:
    """Sends the tokens round the devices of the expert axis instead of their slots.

    Each device adds what its experts make of the visitors and passes both on, so a device sends its
    tokens and their sums once per step: what dropless routing, with a slot for every token at every
    expert, sends is then independent of the number of experts and of the capacity.

    Args:
        work: ``(experts, x (g, S, M), tables) -> (g, S, M)``, with the tables of these experts.
        experts: module whose parameters' axes are named ``expert`` where they are the experts'.
        tokens: ``(G, S, M)``.
        tables: arrays ``(G, E, ...)``, what ``work`` must know of a group for each expert.

    Returns:
        ``(G, S, M)``, the sums over all experts.
    """
    shards = axis_size("expert")

    def local(experts: Any, x: Array, tables: Any) -> Array:
        me, tables = jax.lax.axis_index("expert"), jax.tree.map(sources, tables)
        onward = [(i, (i + 1) % shards) for i in range(shards)]

        @jax.checkpoint
        def step(carried: tuple[Array, Array], number: Array) -> tuple[tuple[Array, Array], None]:
            x, y = carried
            mine = jax.tree.map(lambda table: table[(me - number) % shards], tables)
            y += work(experts, x, mine)
            return jax.lax.ppermute((x, y), "expert", onward), None

        return jax.lax.scan(step, (x, jnp.zeros_like(x)), jnp.arange(shards))[0][1]

    def sources(table: Array) -> Array:
        """What each device of the ring says of the experts here, ``(shards, g, E', ...)``."""
        got = jax.lax.all_to_all(table, "expert", split_axis=1, concat_axis=0, tiled=True)
        return got.reshape(shards, -1, *got.shape[1:])

    by_expert = jax.tree.map(_by_expert, experts, is_leaf=_is_variable)
    run = on_devices(local, (by_expert, spec("group"), spec("group")), spec("group"))
    return run(experts, tokens, tables)


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _by_expert(variable: nnx.Variable) -> Any:
    names = variable.get_metadata()["axes"]
    parts = ("expert" if name == "expert" else None for name in names)
    return variable.replace(PartitionSpec(*parts))
