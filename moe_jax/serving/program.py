"""The compiled step of an engine: tokens of all running requests in, samples of each out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.stages import Lowered
from jaxtyping import Array, Bool, Float, Int, Int16

from moe_jax.decoding import Rules, choose_by_row
from moe_jax.models import Decoder
from moe_jax.models.cache import Cache, PagedCache
from moe_jax.models.stack import StackCache
from moe_jax.nn.mode import DECODE
from moe_jax.nn.moe import MoEAux
from moe_jax.parallel import constrain
from moe_jax.parallel.rules import platform

# Programs that compile at once. One uses several cores only in part; more need more memory.
_COMPILING = 2


@dataclasses.dataclass(frozen=True)
class StepShape:
    """The shapes of one program.

    Attributes:
        slots: Largest number ``S`` of requests in the step; each has a row.
        chunk: Number of tokens of prompts that the step reads beside them; 0 for none.
        pages: Number of pages per request that the step reads.
        page: Number of entries per page.
        drafts: Number of drafted tokens per request that the step checks.
        pieces: Number ``P`` of equal pieces of the chunk. A piece has tokens of one request, and a
            request may have several pieces.
    """

    slots: int
    chunk: int
    pages: int
    page: int
    drafts: int = 0
    pieces: int = 1

    @property
    def piece(self) -> int:
        """Number of tokens of a piece of the chunk."""
        return self.chunk // self.pieces

    @property
    def each(self) -> int:
        """Number ``W`` of tokens of a slot, its drafts included, and of samples after them."""
        return 1 + self.drafts

    @property
    def before_chunk(self) -> int:
        """Number of tokens of all slots, which come before the chunk."""
        return self.slots * self.each

    @property
    def tokens(self) -> int:
        """Number ``N`` of tokens of the step: those of the slots, then the chunk."""
        return self.before_chunk + self.chunk


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepInputs:
    """The arrays of one step.

    Attributes:
        tokens: Token ids ``(N,)`` int32.
        positions: Positions ``(N,)`` int32.
        valid: Mask ``(N,)``, False for padding.
        entries: Entry ``(N,)`` int32 that each token writes.
        tables: Pages ``(S, pages)`` of the slots and, with a chunk, ``(P, pages)`` of its pieces.
        ends: Indices ``(S, W)`` of the tokens after which a slot samples.
        rules: Ways to sample.
        seeds: Seed ``(S,)`` uint32 of each slot.
        sampled: Number ``(S,)`` int32 of tokens that each slot has sampled before the first.
        ranked: True if a request asks for the most likely tokens, a scalar.
    """

    tokens: Int[Array, " N"]
    positions: Int[Array, " N"]
    valid: Bool[Array, " N"]
    entries: Int[Array, " N"]
    tables: tuple[Int[Array, "R pages"], ...]
    ends: Int[Array, "S W"]
    rules: Rules
    seeds: Int[Array, " S"]
    sampled: Int[Array, " S"]
    ranked: Bool[Array, ""]

    @classmethod
    def empty(cls, shape: StepShape) -> StepInputs:
        """Returns the arrays of a step without tokens, in the memory of the host."""

        def zeros(size: int, dtype: Any = np.int32) -> Any:
            return np.zeros(size, dtype)

        slots, tokens = shape.slots, shape.tokens
        ends: Any = np.zeros((slots, shape.each), np.int32)
        parts = (slots, shape.pieces) if shape.chunk else (slots,)
        rules = Rules(zeros(slots, np.float32), zeros(slots), np.ones(slots, np.float32))  # type: ignore[arg-type]
        return cls(
            zeros(tokens),
            zeros(tokens),
            zeros(tokens, bool),
            zeros(tokens),
            tuple(np.zeros((part, shape.pages), np.int32) for part in parts),  # type: ignore[misc]
            ends,
            rules,
            zeros(slots, np.uint32),
            zeros(slots),
            np.zeros((), bool),  # type: ignore[arg-type]
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Samples:
    """The samples of one step.

    Attributes:
        tokens: Token ids ``(S, W)`` int32.
        logprobs: Log-probability ``(S, W)`` of each at temperature 1, float32.
        top: Most likely token ids ``(S, W, A)`` int32, most likely first; zeros unless ``ranked``.
        top_logprobs: Log-probabilities ``(S, W, A)`` of them.
        loads: Number ``(E,)`` of tokens of each expert in the step, for each MoE layer.
        hidden: Hidden states ``(N, 1, M)`` of all tokens of the step, if a drafter reads them.
        choices: Expert ``(layers, N, K)`` of each choice, for each MoE layer, negative for none; if
            alarms read them. ``K`` is the largest number of choices of a layer.
    """

    tokens: Int[Array, "S W"]
    logprobs: Float[Array, "S W"]
    top: Int[Array, "S W A"]
    top_logprobs: Float[Array, "S W A"]
    loads: tuple[Float[Array, " E"], ...]
    hidden: Float[Array, "N 1 M"] | None = None
    choices: Int16[Array, "layers N K"] | None = None


def step(
    model: Decoder,
    layers: StackCache,
    inputs: StepInputs,
    shape: StepShape,
    top: int,
    also: Collection[str] = (),
) -> tuple[StackCache, Samples]:
    """Returns the pages with the tokens of a step, and the samples after ``ends``.

    Args:
        model: Decoder.
        layers: Pages of all layers.
        inputs: Arrays of the step.
        shape: Shapes of the step.
        top: Number ``A`` of most likely tokens.
        also: Names of optional fields of the samples to return, ``hidden`` and ``choices``.
    """
    each = shape.each
    hidden, reports, cache = model.extend_reported(
        inputs.tokens[:, None],
        inputs.valid.astype(jnp.int32)[:, None],
        inputs.positions[:, None],
        paged(layers, inputs, shape),
        mode=dataclasses.replace(DECODE, record="choices" in also),
    )
    logits = model.logits(hidden[inputs.ends.reshape(-1)])[:, 0]
    rules, seeds = jax.tree.map(lambda x: jnp.repeat(x, each), (inputs.rules, inputs.seeds))
    sampled = (inputs.sampled[:, None] + jnp.arange(each)).reshape(-1)
    tokens = choose_by_row(logits, rules, jax.vmap(key_of)(seeds, sampled))
    total = jax.nn.logsumexp(logits, axis=-1)
    own = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0] - total
    best, ids = _ranked(logits, top, inputs.ranked)
    loads = tuple(report.counts.load for report in reports)

    def by_slot(x: Array) -> Array:
        return x.reshape(shape.slots, each, *x.shape[1:])

    best = best - total[:, None]
    found = Samples(
        by_slot(tokens),
        by_slot(own),
        by_slot(ids),
        by_slot(best),
        loads,
        hidden if "hidden" in also else None,
        _choices(reports) if "choices" in also else None,
    )
    return sharded(cache.layers), found


def _choices(reports: Sequence[MoEAux]) -> Int16[Array, "layers N K"]:
    """Returns the choices of all layers, with -1 after those of a layer with fewer."""
    own = [report.choices[:, 0] for report in reports if report.choices is not None]
    most = max(choices.shape[1] for choices in own)
    ends = [((0, 0), (0, most - choices.shape[1])) for choices in own]
    return jnp.stack(
        [jnp.pad(x, end, constant_values=-1) for x, end in zip(own, ends, strict=True)]
    )


def paged(layers: StackCache, inputs: StepInputs, shape: StepShape) -> PagedCache:
    """Returns the pages of some layers, for the tokens of a step."""
    lengths = (shape.each, shape.piece) if shape.chunk else (shape.each,)
    return PagedCache(layers, inputs.entries, inputs.tables, lengths, shape.page)


def _ranked(
    logits: Float[Array, "S V"], top: int, ranked: Bool[Array, ""]
) -> tuple[Float[Array, "S A"], Int[Array, "S A"]]:
    """Returns the ``A`` largest logits and their tokens, or zeros unless ``ranked``."""

    def found() -> tuple[Array, Array]:
        best, ids = jax.lax.top_k(logits, top)
        return best, ids.astype(jnp.int32)

    shape = len(logits), top
    return jax.lax.cond(
        ranked, found, lambda: (jnp.zeros(shape, logits.dtype), jnp.zeros(shape, jnp.int32))
    )


def key_of(seed: Any, sampled: Any) -> Array:
    """Returns the key of the sample after ``sampled`` samples of a request."""
    return jax.random.fold_in(jax.random.key(seed), sampled)


class HasCache(Protocol):
    """Layers with a cache: a decoder, or its lookahead modules."""

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """Returns an empty cache for ``batch`` rows of up to ``slots`` tokens."""


def pages_of(model: HasCache, entries: int) -> StackCache:
    """Returns empty entries for all layers; a mesh splits their heads."""
    made = _empty_pages(model, entries)
    if platform() != "tpu":
        return jax.jit(made)()
    formats = jax.tree.map(lambda x: x.format, abstract_pages(model, entries))
    return jax.jit(made, out_shardings=formats)()


def abstract_pages(model: HasCache, entries: int) -> StackCache:
    """Returns shapes, shardings and layouts of ``pages_of`` on the current mesh, without memory."""
    program = jax.jit(_empty_pages(model, entries)).lower().compile()
    return jax.tree.map(_abstract, program.out_info, program.output_shardings)


def _empty_pages(model: HasCache, entries: int) -> Callable[[], StackCache]:
    return lambda: sharded(model.empty_cache(1, entries).layers)


def _abstract(x: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    """Returns the description of entries ``(..., H, E, D)``.

    A scatter of a TPU writes entries of several heads in place only if they precede heads in
    memory; otherwise the program would copy all pages in every step. Entries of one head, such as
    latents, need no other order.
    """
    if platform() != "tpu" or sharding.shard_shape(x.shape)[-3] == 1:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    *before, heads, entries, width = range(x.ndim)
    layout = Format(Layout((*before, entries, heads, width)), sharding)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout)


def sharded(layers: StackCache) -> StackCache:
    """Returns entries ``(..., H, E, D)`` whose heads are split as queries are."""

    def one(x: Array) -> Array:
        return constrain(x, *(None,) * (x.ndim - 3), "heads", None, None)

    return jax.tree.map(one, layers)


def compiled(
    model: Decoder,
    layers: StackCache,
    shapes: Iterable[StepShape],
    top: int,
    also: Collection[str] = (),
) -> dict[StepShape, Any]:
    """Returns the compiled steps: functions of the model's leaves, the pages and the inputs."""
    return compiled_together((shape, lowered(model, layers, shape, top, also)) for shape in shapes)


def compiled_together(programs: Iterable[tuple[StepShape, Lowered]]) -> dict[StepShape, Any]:
    """Returns compiled programs by the shapes of their steps; two compile at once."""
    with ThreadPoolExecutor(_COMPILING) as pool:
        started = {shape: pool.submit(program.compile) for shape, program in programs}
        return {shape: program.result() for shape, program in started.items()}


def lowered(
    model: Decoder,
    layers: StackCache,
    shape: StepShape,
    top: int,
    also: Collection[str] = (),
) -> Lowered:
    """Returns the step before its compilation; arrays may be shapes with shardings."""

    def run(model: Decoder, layers: StackCache, inputs: StepInputs) -> Any:
        return step(model, layers, inputs, shape, top, also)

    return in_place(run, model, layers, StepInputs.empty(shape))


def in_place(run: Callable, model: Any, layers: StackCache, inputs: Any) -> Lowered:
    """Returns a program of the leaves of a model, its pages and inputs, before its compilation.

    Args:
        run: Function of the model, the pages and the inputs to the new pages and more outputs.
        model: Modules; arrays may be shapes with shardings.
        layers: Pages, which the program overwrites.
        inputs: Arrays of a step, or their shapes.
    """
    leaves, tree = jax.tree.flatten(model)

    def of_leaves(leaves: list[Array], layers: StackCache, inputs: Any) -> Any:
        return run(jax.tree.unflatten(tree, leaves), layers, inputs)

    kept = jax.tree.map(lambda x: x.format, layers)
    # An array that is on no device by choice, as the state of placed copies, may go to any.
    held = [leaf.sharding if getattr(leaf, "committed", True) else None for leaf in leaves]
    program = jax.jit(
        of_leaves, donate_argnums=1, in_shardings=(held, kept, None), out_shardings=(kept, None)
    )
    return program.lower(leaves, layers, inputs)
