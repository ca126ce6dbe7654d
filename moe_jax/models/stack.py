"""A stack of layers, scanned where they repeat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


class Stack(nnx.Module):
    """Layers in order; equal neighbours are stacked and scanned, or unrolled on request."""

    def __init__(self, layers: Sequence[BlockConfig], key: Array, *, scan: bool, remat: Remat):
        """Makes layer ``i`` from the ``i``-th key, so scanning changes no parameter."""
        keys = jax.random.split(key, len(layers))
        parts, counts, start = [], [], 0
        for pattern, count in runs(layers) if scan else [((layer,), 1) for layer in layers]:
            size = len(pattern)
            block_keys = keys[start : start + size * count].reshape(count, size)
            parts.append(nnx.List(_stacked(c, block_keys[:, i]) for i, c in enumerate(pattern)))
            counts.append(count)
            start += size * count
        self.parts = nnx.List(parts)
        self.counts = tuple(counts)
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
        keys = None if rng is None else jax.random.split(rng, self.num_layers)
        by_part = self._by_part(records)
        caches = [(None,) * len(blocks) for blocks in self.parts] if cache is None else cache
        reports: list[MoEAux] = []
        grown: StackCache = []
        start = 0
        for blocks, count, part, kept in zip(self.parts, self.counts, by_part, caches, strict=True):
            size = len(blocks) * count
            part_keys = None
            if keys is not None:
                part_keys = keys[start : start + size].reshape(count, len(blocks))
            steps = (tuple(blocks), part_keys, part, kept)
            x, (aux, kept) = self._run(steps, count, x, context, mode)
            grown.append(kept)
            for step in range(count):
                found = (report for block in aux for report in block)
                reports += [jax.tree.map(lambda a, i=step: a[i], report) for report in found]
            start += size
        return x, tuple(reports), None if cache is None else grown

    def empty_cache(self, batch: int, slots: int, dtype: jnp.dtype) -> StackCache:
        """Returns zeros for the keys and values of ``slots`` tokens in ``batch`` rows."""

        def of(block: Block) -> LayerCache:
            x = jnp.zeros((batch, slots, block.source_width), dtype)
            positions = jnp.zeros((batch, slots), int)
            return {"self": block.attention.project(x, positions)}

        def zeros(block: Block, count: int) -> LayerCache:
            shapes = jax.eval_shape(lambda: of(jax.tree.map(lambda leaf: leaf[0], block)))
            return jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape), leaf.dtype), shapes)

        return [
            tuple(zeros(block, count) for block in blocks)
            for blocks, count in zip(self.parts, self.counts, strict=True)
        ]

    def place(self, layer: int) -> tuple[int, int, int]:
        """Returns where layer ``layer`` is: its part, its block in that, and its step in a scan."""
        for part, (blocks, count) in enumerate(zip(self.parts, self.counts, strict=True)):
            if layer < len(blocks) * count:
                return part, layer % len(blocks), layer // len(blocks)
            layer -= len(blocks) * count
        raise IndexError(f"there are {self.num_layers} layers")

    def update_routers(self, demands: Sequence[Array]) -> None:
        """Moves the state of all routers on by one optimizer step.

        Args:
            demands: ``(E,)`` per MoE layer in order: assignments asked for in the whole step.
        """
        for blocks, part in zip(self.parts, self._by_part(demands), strict=True):
            for block, mine in zip(blocks, part, strict=True):
                for router, demand in zip(block.routers, mine, strict=True):
                    router.update(demand)

    def _by_part(
        self, values: Sequence[Array] | None
    ) -> list[tuple[tuple[Array, ...] | None, ...]]:
        """Stacks one array per MoE layer as the layers are: ``(count, ...)``, by block."""
        found, start = [], 0
        for blocks, count in zip(self.parts, self.counts, strict=True):
            sizes = [len(block.config.mixtures) for block in blocks]
            end, period = start + sum(sizes) * count, sum(sizes)
            stacked: list[tuple[Array, ...] | None] = []
            for size in sizes:
                places = range(start, start + size)
                mine = () if values is None else (jnp.stack(values[i:end:period]) for i in places)
                stacked.append(None if values is None else tuple(mine))
                start += size
            start = end
            found.append(tuple(stacked))
        return found

    def _run(
        self, steps: Any, count: int, x: Array, context: Context, mode: Mode
    ) -> tuple[Array, tuple[tuple[tuple[MoEAux, ...], ...], tuple[LayerCache | None, ...]]]:
        """Runs ``steps = (blocks, keys, records, caches)``, each stacked ``count`` times."""

        def body(x: Array, step: tuple[tuple[Block, ...], Array | None, tuple, tuple]):
            layers, layer_keys, records, caches = step
            layers = constrain_parameters(layers)
            reports, grown = [], []
            for i, (layer, mine, cache) in enumerate(zip(layers, records, caches, strict=True)):
                key = None if layer_keys is None else layer_keys[i]
                x, found, cache = layer(x, context, mode=mode, rng=key, records=mine, cache=cache)
                reports.append(found)
                grown.append(cache)
            return x, (tuple(reports), tuple(grown))

        body = _rematerialised(body, self.remat)
        if count == 1:
            x, found = body(x, jax.tree.map(lambda leaf: leaf[0], steps))
            return x, jax.tree.map(lambda leaf: leaf[None], found)
        return jax.lax.scan(body, x, steps)


def _stacked(config: BlockConfig, keys: Array) -> Block:
    return jax.vmap(lambda key: Block(config, key))(keys)


def _rematerialised(body: Callable, remat: Remat) -> Callable:
    if remat == "none":
        return body
    return jax.checkpoint(body, policy=_POLICIES[remat], prevent_cse=False)
