"""A stack of layers, scanned where they repeat."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.nn.block import Block, BlockConfig, Context, LayerCache
from moe_jax.nn.mode import Mode
from moe_jax.nn.moe import MoEAux
from moe_jax.parallel import constrain_parameters

Array = jax.Array
Remat = Literal["none", "full", "dots", "dots_no_batch"]
StackCache = list[tuple[LayerCache, ...]]
_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def runs(layers: Sequence[Any]) -> list[tuple[tuple[Any, ...], int]]:
    """Cuts a list of layers into ``(pattern, repeats)`` whose concatenation is the list.

    Each step takes the pattern that covers most of what is left, the shortest of equals, so
    ``[d, m, d, m]`` is ``[((d, m), 2)]`` and ``[d, m, m, m]`` is ``[((d,), 1), ((m,), 3)]``.
    """
    found = []
    start = 0
    while start < len(layers):
        rest = layers[start:]
        period, count = max(
            ((p, _repeats(rest, p)) for p in range(1, len(rest) // 2 + 1)),
            key=lambda choice: (choice[0] * choice[1] if choice[1] > 1 else 0, -choice[0]),
            default=(1, 1),
        )
        period, count = (period, count) if count > 1 else (1, 1)
        found.append((tuple(rest[:period]), count))
        start += period * count
    return found


def _repeats(layers: Sequence[Any], period: int) -> int:
    pattern = list(layers[:period])
    count = 1
    while list(layers[count * period : (count + 1) * period]) == pattern:
        count += 1
    return count


@dataclasses.dataclass(frozen=True)
class LayerView:
    """Where one layer of a stack is.

    Attributes:
        index: the layer's, from 0.
        path: the attributes and indices that lead from the stack to ``block``.
        block: the layer alone, or its stacked form: equal layers that a scan runs, with a leading
            axis on every array.
        entry: the layer's index on that axis; ``None`` if ``block`` is the layer alone.
    """

    index: int
    path: tuple[str | int, ...]
    block: Block
    entry: int | None

    def take(self, tree: Any) -> Any:
        """Returns the layer's own part of arrays that are stacked as ``block`` is."""
        if self.entry is None:
            return tree
        return jax.tree.map(lambda leaf: leaf[self.entry], tree)


class Stack(nnx.Module):
    """Layers in order; equal neighbours are stacked and scanned, or unrolled on request.

    ``parts[P][B]`` is block ``B`` of the pattern that part ``P`` repeats ``repeats[P]`` times. The
    arrays of a pattern that runs once have the shapes of one layer; those of a pattern that a scan
    repeats have a leading axis of ``repeats[P]``.
    """

    def __init__(self, layers: Sequence[BlockConfig], key: Array, *, scan: bool, remat: Remat):
        """Makes layer ``i`` from the ``i``-th key, so scanning changes no parameter."""
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
        x: Array,
        context: Context,
        *,
        mode: Mode,
        rng: Array | None,
        records: Sequence[Array] | None = None,
        cache: StackCache | None = None,
    ) -> tuple[Array, tuple[MoEAux, ...], StackCache | None]:
        """Maps ``x (B, L, M)`` to ``(B, L, M)``.

        Args:
            x: the embedded tokens.
            context: what all layers share.
            mode: see ``Mode``.
            rng: key of everything random in training.
            records: the routing to force, ``(B, L, K)`` per MoE layer in order.
            cache: keys and values of the tokens before these, as from ``empty_cache``.

        Returns:
            The output, one report per MoE layer in order, and the cache with these tokens' keys and
            values, ``None`` if none was given.
        """
        keys = [None] * self.num_layers if rng is None else jax.random.split(rng, self.num_layers)
        inputs = self._by_part(list(zip(keys, self._by_layer(records), strict=True)))
        caches = [(None,) * len(blocks) for blocks in self.parts] if cache is None else cache
        reports: list[MoEAux] = []
        new_caches: StackCache = []
        parts = zip(self.parts, inputs, caches, self.repeats, strict=True)
        for blocks, part_inputs, old_caches, repeats in parts:
            part = (tuple(blocks), part_inputs, old_caches)
            x, part_reports, part_caches = self._run(part, repeats, x, context, mode)
            reports += part_reports
            new_caches.append(part_caches)
        return x, tuple(reports), None if cache is None else new_caches

    def layers(self) -> Iterator[LayerView]:
        """Yields every layer in order: the one place that says where a layer is."""
        index = 0
        for i, (blocks, repeats) in enumerate(zip(self.parts, self.repeats, strict=True)):
            for repeat in range(repeats):
                for j, block in enumerate(blocks):
                    yield LayerView(index, ("parts", i, j), block, repeat if repeats > 1 else None)
                    index += 1

    def empty_cache(self, batch: int, slots: int, dtype: jnp.dtype) -> StackCache:
        """Returns zeros for the keys and values of ``slots`` tokens in ``batch`` rows."""

        def projected(block: Block) -> LayerCache:
            x = jnp.zeros((batch, slots, block.source_width), dtype)
            positions = jnp.zeros((batch, slots), int)
            return {"self": block.attention.project(x, positions)}

        def zeros(block: Block, repeats: int) -> LayerCache:
            made = projected if repeats == 1 else jax.vmap(projected)
            shapes = jax.eval_shape(made, block)
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        return [
            tuple(zeros(block, repeats) for block in blocks)
            for blocks, repeats in zip(self.parts, self.repeats, strict=True)
        ]

    def update_routers(self, demands: Sequence[Array]) -> None:
        """Moves the state of all routers on by one optimizer step.

        Args:
            demands: ``(E,)`` per MoE layer in order: assignments asked for in the whole step.
        """
        by_part = self._by_part(self._by_layer(demands))
        for blocks, part_demands in zip(self.parts, by_part, strict=True):
            for block, block_demands in zip(blocks, part_demands, strict=True):
                for router, demand in zip(block.routers, block_demands, strict=True):
                    router.update(demand)

    def _by_layer(self, values: Sequence[Array] | None) -> list[tuple[Array, ...] | None]:
        """Hands one array per MoE layer in order to the layers; a dense layer gets ``()``."""
        if values is None:
            return [None] * self.num_layers
        rest = iter(values)
        sizes = [len(layer.block.config.mixtures) for layer in self.layers()]
        return [tuple(itertools.islice(rest, size)) for size in sizes]

    def _by_part(self, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        """Arranges one tree per layer as the blocks are, ``[part][block]``, stacked for scans."""
        found: dict[tuple[str | int, ...], list[Any]] = {}
        for layer, value in zip(self.layers(), values, strict=True):
            found.setdefault(layer.path, []).append(value)
        return [
            tuple(_stacked(found["parts", i, j]) for j in range(len(blocks)))
            for i, blocks in enumerate(self.parts)
        ]

    def _run(
        self, part: Any, repeats: int, x: Array, context: Context, mode: Mode
    ) -> tuple[Array, tuple[MoEAux, ...], tuple[LayerCache | None, ...]]:
        """Runs the layers of one part.

        Args:
            part: blocks, their keys and records, and their caches; a scan has them stacked.
            repeats: how often the blocks run, one after the other.
            x: ``(B, L, M)``.
            context: what all layers share.
            mode: see ``Mode``.

        Returns:
            The output, the reports in the order of the layers, and the caches, stacked as given.
        """

        def body(x: Array, part: Any) -> tuple[Array, tuple[tuple[MoEAux, ...], tuple]]:
            blocks, inputs, caches = part
            blocks = constrain_parameters(blocks)
            reports: tuple[MoEAux, ...] = ()
            new_caches = []
            for block, (key, records), cache in zip(blocks, inputs, caches, strict=True):
                x, found, cache = block(
                    x, context, mode=mode, rng=key, records=records, cache=cache
                )
                reports += found
                new_caches.append(cache)
            return x, (reports, tuple(new_caches))

        body = _rematerialised(body, self.remat)
        if repeats == 1:
            x, (reports, caches) = body(x, part)
            return x, reports, caches
        x, (stacked, caches) = jax.lax.scan(body, x, part)
        reports = [
            jax.tree.map(lambda leaf, i=i: leaf[i], report)
            for i in range(repeats)
            for report in stacked
        ]
        return x, tuple(reports), caches


def _made(config: BlockConfig, keys: Array) -> Block:
    """Makes one block per key ``(R,)``, stacked unless there is one."""
    if len(keys) == 1:
        return Block(config, keys[0])
    return jax.vmap(lambda key: Block(config, key))(keys)


def _stacked(trees: Sequence[Any]) -> Any:
    """Stacks the arrays of equal trees along a new leading axis, unless there is one tree."""
    if len(trees) == 1:
        return trees[0]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _rematerialised(body: Callable, remat: Remat) -> Callable:
    if remat == "none":
        return body
    return jax.checkpoint(body, policy=_POLICIES[remat], prevent_cse=False)
