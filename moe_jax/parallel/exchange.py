"""Exchanges of slots and functions of local arrays, which run on every device of the mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from moe_jax.parallel.mesh import AXES
from moe_jax.parallel.rules import axis_size, constrain, spec


@runtime_checkable
class Exchange(Protocol):
    """Moves slots between the devices of their groups and the devices of their experts."""

    def to_experts(self, x: Float[Array, "G E C M"]) -> Float[Array, "E GC M"]:
        """Moves ``(G, E, C, M)`` to ``(E, G C, M)``; the exchange chooses the order of slots."""

    def to_groups(self, y: Float[Array, "E GC M"], groups: int) -> Float[Array, "G E C M"]:
        """Moves ``(E, G C, M)`` to ``(G, E, C, M)``: the inverse of ``to_experts``."""


def group_shards() -> int:
    """Returns the number of shards over which the current mesh splits the groups."""
    return axis_size("group")


def over_groups(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns ``function`` mapped over devices, so that it sees only the groups of a device.

    All arrays of ``function`` start with ``G``, and it must treat groups independently, as routing
    does. XLA cannot split ``top_k`` over a batch axis: it would gather the scores of all groups on
    every device.
    """
    if group_shards() == 1:
        return function
    return on_devices(function, spec("group"), spec("group"))


def over_batch(function: Callable[..., Any], module: Any, *arrays: Array) -> Any:
    """Returns ``function(module, *arrays)``, where each device sees only its tokens.

    All arrays start with ``(B, L)``. The gradient of ``module`` is summed over devices once; in a
    loop, XLA would sum it in every iteration.
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
    """Returns ``function(module, *groups)``, where each device sees only its groups.

    Args:
        function: Function whose result starts with ``G`` too.
        module: Module that every device holds as a whole; a split module is gathered.
        groups: Arrays, or trees of arrays, that start with ``G``.
    """
    if group_shards() == 1:
        return function(module, *groups)
    arguments = (PartitionSpec(), *(spec("group") for _ in groups))
    return on_devices(function, arguments, spec("group"))(module, *groups)


def on_devices(function: Callable[..., Any], arguments: Any, result: Any) -> Callable[..., Any]:
    """Returns ``function`` mapped over devices; see ``jax.shard_map`` for the partitions.

    ``shard_map`` takes over all mesh axes except tensor parallelism, which XLA partitions. Kernels
    of Pallas cannot be partitioned, so a ``model`` axis of one shard is taken over too.
    """
    manual = frozenset(AXES) - ({"model"} if axis_size("mlp") > 1 else set())
    # The check of varying axes would require marks on the constants from which loops start.
    return jax.shard_map(
        function, in_specs=arguments, out_specs=result, axis_names=manual, check_vma=False
    )


def over_heads(
    function: Callable[..., Any],
    heads: tuple[Array, ...],
    tokens: tuple[Array, ...],
    scalars: tuple[Array, ...] = (),
) -> Any:
    """Returns ``function(*heads, *tokens, *scalars)`` on the rows and heads of each device.

    A batch that the mesh does not divide is whole on every device. The numbers of heads must be
    multiples of the mesh axis.

    Args:
        function: Function that treats rows and heads independently; its result is ``(B, H, ...)``.
        heads: Arrays ``(B, H, ...)``, whose numbers of heads may differ.
        tokens: Arrays ``(B, L)``, which every head reads.
        scalars: Arrays ``(H,)``.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(*heads, *tokens, *scalars)
    rows = "batch" if heads[0].shape[0] % axis_size("batch") == 0 else None
    arguments = (
        *(spec(rows, "heads") for _ in heads),
        *(spec(rows) for _ in tokens),
        *(spec("heads") for _ in scalars),
    )
    return jax.shard_map(
        function, in_specs=arguments, out_specs=spec(rows, "heads"), check_vma=False
    )(*heads, *tokens, *scalars)


class Gspmd:
    """The all-to-all as a transpose that XLA partitions (GShard, 2006.16668, section 3.3).

    XLA emits exactly one all-to-all for this form: split the group and expert axes into (shard,
    rest), swap the two shard axes, and constrain the first of them to the expert mesh axis before
    the swap and the second after it. Fewer constraints, such as the expert axis alone, add
    all-gathers.
    """

    def to_experts(self, x: Float[Array, "G E C M"]) -> Float[Array, "E GC M"]:
        """Moves ``(G, E, C, M)`` to ``(E, G C, M)``."""
        groups, experts, capacity, width = x.shape
        if group_shards() == 1:
            return x.swapaxes(0, 1).reshape(experts, groups * capacity, width)
        replicas, shards, parts = _shards()
        x = x.reshape(replicas, shards, parts, -1, shards, experts // shards, capacity, width)
        x = constrain(x, "replica", "expert", "length")
        x = constrain(jnp.swapaxes(x, 1, 4), "replica", "expert", "length")
        x = x.transpose(1, 5, 0, 2, 4, 3, 6, 7).reshape(experts, groups * capacity, width)
        return constrain(x, "expert", "slots")

    def to_groups(self, y: Float[Array, "E GC M"], groups: int) -> Float[Array, "G E C M"]:
        """Moves ``(E, G C, M)`` to ``(G, E, C, M)``."""
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
    """The all-to-all as an explicit ``jax.lax.all_to_all`` of the slots on each device."""

    def to_experts(self, x: Float[Array, "G E C M"]) -> Float[Array, "E GC M"]:
        """Moves ``(G, E, C, M)`` to ``(E, G C, M)``."""
        if group_shards() == 1:
            return GSPMD.to_experts(x)

        def local(x: Array) -> Array:
            x = jax.lax.all_to_all(x, "expert", split_axis=1, concat_axis=0, tiled=True)
            groups, experts, capacity, width = x.shape
            return x.swapaxes(0, 1).reshape(experts, groups * capacity, width)

        return on_devices(local, spec("group"), spec("expert", "slots"))(x)

    def to_groups(self, y: Float[Array, "E GC M"], groups: int) -> Float[Array, "G E C M"]:
        """Moves ``(E, G C, M)`` to ``(G, E, C, M)``."""
        if group_shards() == 1:
            return GSPMD.to_groups(y, groups)
        capacity, local_groups = y.shape[1] // groups, groups // axis_size("slots")

        def local(y: Array) -> Array:
            y = y.reshape(y.shape[0], local_groups, capacity, y.shape[-1]).swapaxes(0, 1)
            return jax.lax.all_to_all(y, "expert", split_axis=0, concat_axis=1, tiled=True)

        return on_devices(local, spec("expert", "slots"), spec("group"))(y)


GSPMD, ALL_TO_ALL = Gspmd(), AllToAll()


def around_the_ring(
    work: Callable[[Any, Array, Any], Array],
    experts: Any,
    tokens: Float[Array, "G S M"],
    tables: Any,
) -> Float[Array, "G S M"]:
    """Sends tokens around the devices of the expert axis, instead of sending slots.

    Each device adds the outputs of its experts to the sums of the visiting tokens, and passes the
    tokens and the sums on. The number of bytes sent thus depends neither on the number of experts
    nor on the capacity, even if every expert has a slot for every token (dropless routing).

    Args:
        work: Function ``(experts, x (g, S, M), tables) -> (g, S, M)`` of the ``g`` groups of a
            device; its tables are those of the device's experts.
        experts: Module of the experts; the expert axes of its parameters are named ``expert``.
        tokens: Tokens ``(G, S, M)``.
        tables: Arrays ``(G, E, ...)`` that ``work`` reads for each group and expert.

    Returns:
        The sums ``(G, S, M)`` over all experts.
    """
    shards = axis_size("expert")

    def local(experts: Any, x: Array, tables: Any) -> Array:
        me, tables = jax.lax.axis_index("expert"), jax.tree.map(by_origin, tables)
        onward = [(i, (i + 1) % shards) for i in range(shards)]

        @jax.checkpoint
        def step(carried: tuple[Array, Array], number: Array) -> tuple[tuple[Array, Array], None]:
            x, y = carried
            visiting = jax.tree.map(lambda table: table[(me - number) % shards], tables)
            y += work(experts, x, visiting)
            with jax.named_scope("exchange"):
                return jax.lax.ppermute((x, y), "expert", onward), None

        return jax.lax.scan(step, (x, jnp.zeros_like(x)), jnp.arange(shards))[0][1]

    def by_origin(table: Array) -> Array:
        """Returns the tables ``(shards, g, E', ...)`` of local experts, by the tokens' device."""
        received = jax.lax.all_to_all(table, "expert", split_axis=1, concat_axis=0, tiled=True)
        return received.reshape(shards, -1, *received.shape[1:])

    return on_expert_devices(local, experts, tokens, tables)


def on_expert_devices(function: Callable[..., Any], experts: Any, *groups: Any) -> Any:
    """Returns ``function(experts, *groups)``, where each device sees its experts and its groups.

    Args:
        function: Function whose result starts with ``G`` too.
        experts: Module of the experts; the expert axes of its parameters are named ``expert``, and
            their other axes are gathered.
        groups: Arrays, or trees of arrays, that start with ``G``.
    """
    by_expert = jax.tree.map(_by_expert, experts, is_leaf=_is_variable)
    arguments = (by_expert, *(spec("group") for _ in groups))
    return on_devices(function, arguments, spec("group"))(experts, *groups)


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _by_expert(variable: nnx.Variable) -> Any:
    names = variable.get_metadata()["axes"]
    parts = ("expert" if name == "expert" else None for name in names)
    return variable.replace(PartitionSpec(*parts))
