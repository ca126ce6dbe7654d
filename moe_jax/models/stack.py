"""A stack of layers, scanned where they repeat."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from moe_jax.attend import PagedView
from moe_jax.nn.block import Block, BlockConfig, Context, LayerCache
from moe_jax.nn.mode import Mode
from moe_jax.nn.moe import MoEAux
from moe_jax.nn.router import RouterLayer
from moe_jax.parallel import constrain_parameters
from moe_jax.routing import Counts

_Value = TypeVar("_Value")

Remat = Literal["none", "full", "dots", "dots_no_batch"]
# Values (B, L, D) that the routers of the layers before pass on, by the name of the MoE layer.
Carried = dict[str, Float[Array, "B L _"]]
# ``[part][block]``, as ``Stack.parts``.
StackCache = list[tuple[LayerCache | None, ...]]
_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def runs(layers: Sequence[Any]) -> list[tuple[tuple[Any, ...], int]]:
    """Returns repeated patterns ``(pattern, repeats)`` whose concatenation is the list of layers.

    Each step takes the pattern that covers most of the remaining layers; among equals, the shortest
    pattern. So ``[d, m, d, m]`` is ``[((d, m), 2)]``, and ``[d, m, m, m]`` is
    ``[((d,), 1), ((m,), 3)]``.
    """
    patterns: list[tuple[tuple[Any, ...], int]] = []
    start = 0
    while start < len(layers):
        rest = layers[start:]
        period, count = max(
            ((p, _repeats(rest, p)) for p in range(1, len(rest) // 2 + 1)),
            key=lambda choice: (choice[0] * choice[1] if choice[1] > 1 else 0, -choice[0]),
            default=(1, 1),
        )
        period, count = (period, count) if count > 1 else (1, 1)
        patterns.append((tuple(rest[:period]), count))
        start += period * count
    return patterns


def _repeats(layers: Sequence[Any], period: int) -> int:
    pattern = list(layers[:period])
    count = 1
    while list(layers[count * period : (count + 1) * period]) == pattern:
        count += 1
    return count


@dataclasses.dataclass(frozen=True)
class LayerView:
    """The location of one layer in a stack.

    Attributes:
        index: Index of the layer, from 0.
        path: Attributes and indices that lead from the stack to ``block``.
        block: Block of this layer alone, or the stacked blocks of equal layers that a scan runs;
            stacked blocks have a leading axis on every array.
        entry: Index of the layer on that axis; ``None`` if ``block`` is this layer alone.
    """

    index: int
    path: tuple[str | int, ...]
    block: Block
    entry: int | None

    def take(self, tree: Any) -> Any:
        """Returns the layer's part of arrays that are stacked as ``block`` is."""
        if self.entry is None:
            return tree
        return jax.tree.map(lambda leaf: leaf[self.entry], tree)


class Stack(nnx.Module):
    """Layers in order; equal neighbours are stacked and scanned, unless ``scan`` is False.

    ``parts[P][B]`` is block ``B`` of the pattern that part ``P`` repeats ``repeats[P]`` times. The
    arrays of a pattern that runs once have the shapes of one layer. The arrays of a pattern that a
    scan repeats have a leading axis of ``repeats[P]``.
    """

    def __init__(
        self, layers: Sequence[BlockConfig], key: PRNGKeyArray, *, scan: bool, remat: Remat
    ):
        """Initialises layer ``i`` from the ``i``-th key, so scanning changes no parameter."""
        keys = jax.random.split(key, len(layers))
        patterns = runs(layers) if scan else [((layer,), 1) for layer in layers]
        self.repeats = tuple(repeats for _, repeats in patterns)
        parts, first = [], 0
        for pattern, repeats in patterns:
            size = len(pattern)
            part_keys = keys[first : first + size * repeats].reshape(repeats, size)
            parts.append(nnx.List(_made(c, part_keys[:, i]) for i, c in enumerate(pattern)))
            first += size * repeats
        self.parts = nnx.List(parts)
        self.num_layers = len(layers)
        self.num_sparse = sum(len(layer.mixtures) for layer in layers)
        self.remat = remat

    def __call__(
        self,
        x: Float[Array, "B L M"],
        context: Context,
        *,
        mode: Mode,
        rng: PRNGKeyArray | None,
        records: Sequence[Int[Array, "B L _"]] | None = None,
        cache: StackCache | None = None,
    ) -> tuple[Float[Array, "B L M"], tuple[MoEAux, ...], StackCache | None]:
        """Returns the output of the last layer.

        Args:
            x: Embedded tokens ``(B, L, M)``.
            context: Context that all layers share.
            mode: Mode of the forward pass; see ``Mode``.
            rng: Key of all randomness in training.
            records: Routing to force, ``(B, L, K)`` per MoE layer in order.
            cache: Keys and values of the tokens before these, as from ``empty_cache``.

        Returns:
            The output ``(B, L, M)``, one report per MoE layer in order, and the cache with these
            tokens' keys and values; ``None`` without a cache.
        """
        keys = [None] * self.num_layers if rng is None else jax.random.split(rng, self.num_layers)
        inputs = self._by_part(list(zip(keys, self._by_layer(records), strict=True)))
        caches = [(None,) * len(blocks) for blocks in self.parts] if cache is None else cache
        reports: list[MoEAux] = []
        new_caches: StackCache = []
        flow = x, self._carried_by_none(x)
        parts = zip(self.parts, inputs, caches, self.repeats, strict=True)
        for blocks, part_inputs, old_caches, repeats in parts:
            part = (tuple(blocks), part_inputs, old_caches)
            flow, part_reports, part_caches = self._run(part, repeats, flow, context, mode)
            reports += part_reports
            new_caches.append(part_caches)
        return flow[0], tuple(reports), None if cache is None else new_caches

    def _carried_by_none(self, x: Float[Array, "B L M"]) -> Carried:
        """Returns the zeros that the routers of the first MoE layers read; no array for most."""
        widths: dict[str, int] = {}
        for layer in self.layers():
            widths |= layer.block.config.carried_widths
        return {name: jnp.zeros((*x.shape[:2], d), jnp.float32) for name, d in widths.items()}

    def layers(self) -> Iterator[LayerView]:
        """Yields the location of every layer, in order."""
        index = 0
        for i, (blocks, repeats) in enumerate(zip(self.parts, self.repeats, strict=True)):
            for repeat in range(repeats):
                for j, block in enumerate(blocks):
                    yield LayerView(index, ("parts", i, j), block, repeat if repeats > 1 else None)
                    index += 1

    def unrolled(self) -> Stack:
        """Returns a stack of the same layers, each with arrays of its own."""
        stack = jax.tree.map(lambda leaf: leaf, self)
        stack.parts = nnx.List(nnx.List([each.take(each.block)]) for each in self.layers())
        stack.repeats = (1,) * self.num_layers
        return stack

    def empty_cache(self, batch: int, slots: int, dtype: jnp.dtype) -> StackCache:
        """Returns a cache of zeros for ``slots`` tokens in each of ``batch`` rows."""

        def projected(block: Block) -> LayerCache:
            x = jnp.zeros((batch, slots, block.source_width), dtype)
            positions = jnp.zeros((batch, slots), int)
            return {"self": block.attention.project(x, positions)}

        def zeros(block: Block, repeats: int) -> LayerCache:
            of_blocks = projected if repeats == 1 else jax.vmap(projected)
            shapes = jax.eval_shape(of_blocks, block)
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        return [
            tuple(zeros(block, repeats) for block in blocks)
            for blocks, repeats in zip(self.parts, self.repeats, strict=True)
        ]

    def update_routers(self, counts: Sequence[Counts]) -> None:
        """Updates the state of all routers after one optimizer step.

        Args:
            counts: Counts of the whole step, per MoE layer in order.
        """
        for router, own in self.with_routers(counts):
            router.update(own)

    def with_routers(self, values: Sequence[_Value]) -> Iterator[tuple[RouterLayer, _Value]]:
        """Yields each router with its value; scanned layers share a router and stack values.

        Args:
            values: A tree of arrays per MoE layer in order.
        """
        by_part = self._by_part(self._by_layer(values))
        for blocks, part_values in zip(self.parts, by_part, strict=True):
            for block, block_values in zip(blocks, part_values, strict=True):
                yield from zip(block.routers, block_values, strict=True)

    def _by_layer(self, values: Sequence[Any] | None) -> list[tuple[Any, ...] | None]:
        """Returns for each layer the values of its MoE layers; ``()`` for a dense layer."""
        if values is None:
            return [None] * self.num_layers
        rest = iter(values)
        sizes = [len(layer.block.config.mixtures) for layer in self.layers()]
        return [tuple(itertools.islice(rest, size)) for size in sizes]

    def _by_part(self, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Returns one tree per layer, arranged as the blocks, ``[part][block]``, and stacked."""
        by_path: dict[tuple[str | int, ...], list[Any]] = {}
        for layer, value in zip(self.layers(), values, strict=True):
            by_path.setdefault(layer.path, []).append(value)
        return [
            tuple(_stacked(by_path["parts", i, j]) for j in range(len(blocks)))
            for i, blocks in enumerate(self.parts)
        ]

    def _run(
        self, part: Any, repeats: int, flow: tuple[Array, Carried], context: Context, mode: Mode
    ) -> tuple[tuple[Array, Carried], tuple[MoEAux, ...], tuple[LayerCache | None, ...]]:
        """Returns the output of the layers of one part, as ``flow``.

        Args:
            part: Blocks, their keys and records, and their caches; for a scan they are stacked.
            repeats: Number of times that the blocks run, one after the other.
            flow: Hidden states ``(B, L, M)``, and what the routers before pass on.
            context: Context that all layers share.
            mode: Mode of the forward pass; see ``Mode``.

        Returns:
            The output, the reports in the order of the layers, and the caches, stacked like the
            caches in ``part``.
        """

        def body(
            flow: Any, part: Any, context: Context = context
        ) -> tuple[Any, tuple[tuple[MoEAux, ...], tuple]]:
            x, carried = flow
            blocks, inputs, caches = part
            blocks = constrain_parameters(blocks)
            reports: tuple[MoEAux, ...] = ()
            new_caches = []
            for block, (key, records), cache in zip(blocks, inputs, caches, strict=True):
                x, own, cache = block(
                    x, context, mode=mode, rng=key, records=records, cache=cache, carried=carried
                )
                carried = carried | _passed_on(block, own)
                reports += tuple(dataclasses.replace(report, carried=None) for report in own)
                new_caches.append(cache)
            return (x, carried), (reports, tuple(new_caches))

        body = _rematerialised(body, self.remat)
        if repeats == 1:
            flow, (reports, caches) = body(flow, part)
            return flow, reports, caches
        if isinstance(context.view, PagedView):
            flow, stacked, caches = _over_pages(body, repeats, flow, part, context, context.view)
        else:
            flow, (stacked, caches) = jax.lax.scan(body, flow, part)
        reports = [
            jax.tree.map(lambda leaf, i=i: leaf[i], report)
            for i in range(repeats)
            for report in stacked
        ]
        return flow, tuple(reports), caches


def _over_pages(
    body: Callable, repeats: int, flow: Any, part: Any, context: Context, view: PagedView
) -> tuple[Any, Any, Any]:
    """Returns the output, the stacked reports and the caches of a scan over layers with pages.

    The pages of all layers are carried as one array, of which a layer writes the entries of a step
    alone. A scan that stacks the caches of layers would copy every page in every step.
    """
    blocks, inputs, pages = part

    def layer(carry: Any, each: Any) -> tuple[Any, Any]:
        flow, pages = carry
        index, blocks, inputs = each
        own = dataclasses.replace(context, view=view.of_layer(index))
        flow, (reports, pages) = body(flow, (blocks, inputs, pages), own)
        return (flow, pages), reports

    each = jnp.arange(repeats), blocks, inputs
    (flow, pages), reports = jax.lax.scan(layer, (flow, pages), each)
    return flow, reports, pages


def _passed_on(block: Block, reports: tuple[MoEAux, ...]) -> Carried:
    """Returns what the routers of one block pass to the next MoE layers."""
    named = zip(block.config.named_mixtures, reports, strict=True)
    return {name: report.carried for name, report in named if report.carried is not None}


def _made(config: BlockConfig, keys: Array) -> Block:
    """Returns one block per key ``(R,)``, stacked if there are several keys."""
    if len(keys) == 1:
        return Block(config, keys[0])
    return jax.vmap(lambda key: Block(config, key))(keys)


def _stacked(trees: Sequence[Any]) -> Any:
    """Returns trees stacked along a new leading axis; a single tree is returned as it is."""
    if len(trees) == 1:
        return trees[0]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _rematerialised(body: Callable, remat: Remat) -> Callable:
    if remat == "none":
        return body
    return jax.checkpoint(body, policy=_POLICIES[remat], prevent_cse=False)
