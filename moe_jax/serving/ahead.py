"""Drafts of the lookahead modules of the model that checks them (2412.19437, section 5.4.3).

After a step, module 0 reads the hidden state of each token and the token after it, and predicts the
token after that. Each further module reads the state of the module before, one token further ahead.
The modules have entries in the pages of the model. Two kinds of entries may have read a token that
is not the one of the request, which lowers the acceptance and changes no token of a request: those
of later modules that have read a wrong draft, and the last ones of a page that requests share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Lowered
from jaxtyping import Array, Int

from moe_jax.decoding import choose_by_row
from moe_jax.models import Decoder
from moe_jax.models.cache import Cache, cached_view
from moe_jax.models.embedding import Embedding
from moe_jax.models.lookahead import Lookahead
from moe_jax.models.stack import StackCache
from moe_jax.nn.block import Context
from moe_jax.nn.positions import RelativeBias
from moe_jax.serving.program import (
    Samples,
    StepInputs,
    StepShape,
    compiled_together,
    in_place,
    key_of,
    paged,
    pages_of,
    sharded,
)
from moe_jax.serving.resident import resident_modules
from moe_jax.serving.running import StepDone, TokensRead


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Modules:
    """The ``D`` lookahead modules of a model, and the parts that they share with it.

    Attributes:
        embedding: Embedding and head of the model.
        relative_bias: Relative positions of the model, if it has them.
        modules: Modules, the one for the nearest token first.
    """

    embedding: Embedding
    relative_bias: RelativeBias | None
    modules: list[Lookahead]

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """Returns a cache for ``batch`` rows of up to ``slots`` tokens, one part per module."""
        dtype = jnp.dtype(self.embedding.config.compute_dtype)
        own = [module.layers.empty_cache(batch, slots, dtype) for module in self.modules]
        return Cache.empty([part for (part,) in own], batch, slots)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Following:
    """The tokens after the tokens of a step.

    Attributes:
        known: Token ids ``(D, N)`` int32 that come ``1 + d`` places later; -1 before they are
            sampled.
        samples: Index ``(N,)`` int32 of the sample after each token, among all ``S * W``.
        last: Index ``(S,)`` int32 of the token before the first sample; ``N`` without a sample.
    """

    known: Int[Array, "D N"]
    samples: Int[Array, " N"]
    last: Int[Array, " S"]

    @classmethod
    def of(cls, parts: Sequence[TokensRead], shape: StepShape, modules: int) -> Following:
        """Returns the tokens of a step, in the memory of the host."""
        known = np.full((modules, shape.tokens), -1, np.int32)
        samples, last = np.zeros(shape.tokens, np.int32), np.full(shape.slots, shape.tokens)
        for part in parts:
            first, start = part.first(shape), part.request.held.computed
            for d, row in enumerate(known):
                later = part.request.tokens[start + 1 + d : start + 1 + d + part.number]
                row[first : first + len(later)] = later
            if part.ends:
                end, places = first + part.number - 1, np.arange(1 + len(part.drafts))
                samples[end + places] = part.row * shape.each + places
                last[part.row] = end
        return cls(known, samples, last.astype(np.int32))  # type: ignore[arg-type]


Inputs = tuple[StepInputs, Following, Samples]


def drafts_of(
    own: Modules, layers: StackCache, read: Inputs, shape: StepShape
) -> tuple[StackCache, Int[Array, "S D"]]:
    """Returns the pages of the modules with the tokens of a step, and drafts ``(S, D)``.

    Args:
        own: Lookahead modules.
        layers: Pages of the modules.
        read: Arrays of the step, the tokens after its tokens, and its samples with hidden states.
        shape: Shapes of the step.
    """
    inputs, following, samples = read
    right = _right(inputs, samples.tokens, shape)
    ends = following.last + right
    assert samples.hidden is not None  # The steps of a model with this drafter return them.
    after, x, new, drafts = samples.tokens.reshape(-1)[following.samples], samples.hidden, [], []
    valid, positions = inputs.valid[:, None], inputs.positions[:, None]
    for d, module in enumerate(own.modules):
        after = jnp.where(following.known[d] >= 0, following.known[d], after)
        cache = paged([layers[d]], inputs, shape)
        view = cached_view(valid.astype(jnp.int32), positions, own.relative_bias, cache)
        embedded = own.embedding(after[:, None], positions)
        context = Context(view, valid, after[:, None])
        x, for_head, (pages,) = module.extend(x, embedded, context, cache.layers)
        logits = own.embedding.logits(for_head[jnp.minimum(ends, shape.tokens - 1)])[:, 0]
        keys = jax.vmap(key_of)(inputs.seeds, inputs.sampled + right + 1 + d)
        drafts.append(choose_by_row(logits, inputs.rules, keys))
        new.append(pages)
        after = jnp.roll(after, -1).at[ends].set(drafts[-1], mode="drop")
    return sharded(new), jnp.stack(drafts, axis=1)


def _right(inputs: StepInputs, sampled: Int[Array, "S W"], shape: StepShape) -> Int[Array, " S"]:
    """Returns the number of drafts of each slot before the first that is not sampled."""
    rows = shape.slots, shape.each
    drafts, real = (x[: shape.before_chunk].reshape(rows) for x in (inputs.tokens, inputs.valid))
    same = (drafts[:, 1:] == sampled[:, :-1]) & real[:, 1:]
    return jnp.cumprod(same, axis=1).sum(axis=1).astype(jnp.int32)


class Ahead:
    """Drafts of lookahead modules; see ``moe_jax.serving.speculation.Drafter``."""

    def __init__(self, model: Decoder, programs: Mapping[StepShape, Any], entries: int) -> None:
        """Allocates the pages of the modules and compiles their programs.

        Args:
            model: Model with lookahead modules.
            programs: Compiled steps of the model, which return hidden states.
            entries: Number of entries of all pages.
        """
        own = Modules(model.embedding, model.relative_bias, resident_modules(model))
        self._number = len(own.modules)
        self._leaves, self._layers = jax.tree.leaves(own), pages_of(own, entries)
        self._programs = compiled_together(
            (shape, _lowered(own, self._layers, shape, program))
            for shape, program in programs.items()
        )
        self._rows: dict[int, int] = {}
        self._drafts: Any = None

    def drafted(self, parts: Sequence[TokensRead], most: int) -> list[TokensRead]:
        """Gives each request the drafts after its last sample; see ``Drafter``."""
        drafts = jax.device_get(self._drafts)

        def one(part: TokensRead) -> TokensRead:
            row, room = self._rows.get(part.request.number), part.room(most)
            if row is None or not room:
                return part
            return dataclasses.replace(part, drafts=tuple(drafts[row, :room].tolist()))

        return [one(part) for part in parts]

    def read(self, done: StepDone) -> None:
        """Reads the tokens and samples of a step, and drafts; see ``Drafter``."""
        following = Following.of(done.parts, done.shape, self._number)
        read = done.inputs, following, _needed(done.samples)
        program = self._programs[done.shape]
        self._layers, self._drafts = program(self._leaves, self._layers, read)
        self._rows = {part.request.number: part.row for part in done.parts if part.ends}


def _needed(samples: Any) -> Any:
    """Returns the samples without the arrays that no module reads."""
    unread = dict.fromkeys(("logprobs", "top", "top_logprobs", "choices"))
    return dataclasses.replace(samples, **unread, loads=())


def _lowered(own: Modules, layers: StackCache, shape: StepShape, program: Any) -> Lowered:
    """Returns the program of drafts after a step, whose outputs stay where the step has them."""

    def run(own: Modules, layers: StackCache, read: Inputs) -> Any:
        return drafts_of(own, layers, read, shape)

    def described(x: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    _, samples = jax.tree.map(described, program.out_info, program.output_shardings)
    read = StepInputs.empty(shape), Following.of((), shape, len(own.modules)), _needed(samples)
    return in_place(run, own, layers, read)
