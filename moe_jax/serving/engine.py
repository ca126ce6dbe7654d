"""The engine: requests join and leave between steps of one model (Orca, OSDI 2022)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from moe_jax.errors import ConfigError
from moe_jax.models import Decoder, Model
from moe_jax.offload import OffloadCounts
from moe_jax.run.sampling import check_can_generate
from moe_jax.serving.offloading import Offload, steps_of
from moe_jax.serving.pages import Pages
from moe_jax.serving.program import Samples, StepShape, pages_of
from moe_jax.serving.request import Request, Token
from moe_jax.serving.running import (
    Running,
    StepDone,
    TokensRead,
    inputs_of,
    parts_of,
    shape_for,
)
from moe_jax.serving.speculation import Drafts, Speculation, agreeing, opened
from moe_jax.serving.stream import StreamState
from moe_jax.serving.traffic import Traffic

# A table of pages is as wide as this number of tokens, or wider by powers of this factor.
_NARROWEST, _GROWTH = 128, 4
# An engine with at least ``_MANY`` slots has steps for few requests too, which have as many rows.
_MANY, _FEW = 8, (1, 4)
# Prompts share a chunk in so many pieces at most, each of at least so many tokens.
_MOST_PIECES, _SHORTEST_PIECE = 8, 32


@dataclasses.dataclass
class Prefill:
    """Counts of the tokens of prompts.

    Attributes:
        computed: Number of tokens whose entries were computed.
        shared: Number of tokens whose entries were those of an earlier request.
    """

    computed: int = 0
    shared: int = 0


class Engine:
    """Samples continuations of requests that share the steps of one model.

    A step reads one token of every running request, and beside them a chunk of one prompt or
    pieces of several. The shapes of a step are few, and all of them are compiled in the
    constructor. The tokens of a request do not depend on the other requests: no expert drops a
    token, and the key of a sample is made of the seed of the request and the number of the sample.

    Attributes:
        prefill: Counts of the tokens of prompts.
        drafts: Counts of drafted tokens.
    """

    def __init__(
        self,
        model: Model,
        slots: int = 16,
        length: int = 2048,
        prefill: int = 64,
        *,
        page: int = 16,
        pages: int = 0,
        logprobs: int = 20,
        mesh: Mesh | None = None,
        speculation: Speculation | None = None,
        offload: Offload | None = None,
        traffic: Traffic | None = None,
    ):
        """Allocates the pages and compiles all programs.

        Args:
            model: Decoder in which tokens choose experts; on a mesh its parameters are placed.
            slots: Largest number of requests that run at once.
            length: Largest number of tokens of a request, with its sample.
            prefill: Largest number of tokens of prompts that a step reads. An engine with many
                slots and without a mesh divides them into at most 8 pieces of at least 32 tokens.
            page: Number of tokens per page; requests share whole pages of a common prefix.
            pages: Number of pages; 0 for so many that all slots have their whole length.
            logprobs: Largest number of most likely tokens that a request may ask for.
            mesh: Mesh of devices.
            speculation: The way to draft tokens; ``None`` drafts none.
            offload: A budget for the experts on the device; ``None`` keeps all of them there.
            traffic: Alarms on the tokens that the engine reads; ``None`` keeps no choice.

        Raises:
            ConfigError: If the model cannot generate text, a size is out of range, a draft model
                has another vocabulary, the model lacks the lookahead modules that draft, or the
                experts cannot be offloaded.
        """
        source = checked(model, length)
        if offload is not None and mesh is not None and mesh.size > 1:
            raise ConfigError(
                f"a budget for experts serves one device, and the mesh has {mesh.size}: leave one "
                "of the two out"
            )
        sizes = {"slots": slots, "length": length, "prefill": prefill, "page": page}
        _check_sizes(sizes, pages, logprobs)
        self._length, self._top = length, min(logprobs, source.embedding.table.shape[0])
        self._chunk, self._mesh = prefill, mesh
        self._pieces = _pieces(slots, prefill, mesh)
        number = pages or slots * -(-length // page)
        self._pages = Pages(number, page)
        self._number = number
        self._slots: list[Running | None] = [None] * slots
        self._queue: deque[tuple[int, Request]] = deque()
        self._submitted = 0
        self._load: tuple[Float[np.ndarray, " E"], ...] = ()
        self.prefill, self.drafts = Prefill(), Drafts()
        self._most_drafts = speculation.most(source) if speculation else 0
        self._traffic = traffic
        hidden = speculation is not None and speculation.reads_hidden
        also = ["hidden"] * hidden + ["choices"] * (traffic is not None)
        with self._on_mesh():
            self._compute = steps_of(source, offload)
            self._model = self._compute.model
            self._leaves = jax.tree.leaves(self._model)
            self._layers = pages_of(self._model, (1 + number) * page)
            sizes_of_steps = _sizes(slots, prefill, self._pieces)
            shapes = _shapes(sizes_of_steps, page, self._pages.of(length), self._most_drafts)
            self._programs = self._compute.compiled(self._layers, shapes, self._top, also)
            self._drafter = opened(speculation, source, self._programs, (1 + number) * page)

    @property
    def programs(self) -> int:
        """Number of compiled programs, all from the constructor."""
        return len(self._programs)

    @property
    def waiting(self) -> int:
        """Number of requests that have no entries yet."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Number of requests that have entries."""
        return sum(request is not None for request in self._slots)

    @property
    def load(self) -> tuple[Float[np.ndarray, " E"], ...]:
        """Number ``(E,)`` of tokens that each expert has read, for each MoE layer."""
        return self._load

    @property
    def offloaded(self) -> OffloadCounts | None:
        """Counts of the experts that layers asked for; ``None`` without a budget for them."""
        return self._compute.counts

    @property
    def stream(self) -> StreamState | None:
        """Alarms of the tokens that the engine has read; ``None`` without rules."""
        return None if self._traffic is None else self._traffic.state

    @property
    def free_pages(self) -> int:
        """Number of pages that no request holds."""
        return self._pages.free

    def submit(self, request: Request) -> int:
        """Queues a request and returns its number.

        Raises:
            ConfigError: If the prompt is empty, holds ids outside the vocabulary, or does not fit
                with its sample into the cache; or if it asks for more log-probabilities than
                ``logprobs``.
        """
        self._check(request)
        self._submitted += 1
        self._queue.append((self._submitted, request))
        return self._submitted

    def cancel(self, number: int) -> None:
        """Forgets a request, waiting or running, and frees its entries at once."""
        self._queue = deque(each for each in self._queue if each[0] != number)
        for slot, request in enumerate(self._slots):
            if request is not None and request.number == number:
                self._leave(slot, request)

    def step(self) -> list[Token]:
        """Computes one step of the running requests; returns their new tokens."""
        self._join()
        parts = parts_of(self._slots, self._chunk, self._pieces)
        if not parts:
            return []
        with self._on_mesh():
            parts = self._drafter.drafted(parts, self._most_drafts) if self._drafter else parts
            shape = shape_for(self._programs, parts)
            inputs = inputs_of(parts, shape)
            self._layers, samples = self._programs[shape](self._leaves, self._layers, inputs)
            if self._drafter:
                self._drafter.read(StepDone(parts, inputs, shape, samples))
        samples = _on_host(dataclasses.replace(samples, hidden=None))
        if self._traffic is not None:
            self._traffic.read(StepDone(parts, inputs, shape, samples))
        self._load = tuple(map(np.add, self._load, samples.loads)) or samples.loads
        return [token for part in parts for token in self._advance(part, samples)]

    def _join(self) -> None:
        """Gives slots and pages to waiting requests, in order, while pieces are left to read them.

        A prompt waits for another one that begins with the same page, to share its entries.
        """
        while self._queue and None in self._slots:
            reading = [each for each in self._slots if each is not None and len(each.unread) > 1]
            size = self._chunk // self._pieces
            taken = sum(-(-len(each.unread) // size) for each in reading)
            number, request = self._queue[0]
            first = request.prompt[: self._pages.size]
            same = any(each.request.prompt[: self._pages.size] == first for each in reading)
            if taken >= self._pieces or same:
                return
            held = self._pages.take(request.prompt, _most(request))
            if held is None:
                return
            self._queue.popleft()
            self.prefill.shared += held.computed
            slot = self._slots.index(None)
            self._slots[slot] = Running(number, request, held, list(request.prompt))

    def _advance(self, part: TokensRead, samples: Samples) -> list[Token]:
        """Counts the tokens that a step has read, and returns the tokens that it has sampled."""
        request, held = part.request, part.request.held
        prompt = len(request.request.prompt)
        self.prefill.computed += max(min(prompt - held.computed, part.number), 0)
        tokens = self._sampled(part, samples) if part.ends else []
        held.computed += part.number + max(len(tokens) - 1, 0)
        self._pages.name(held, request.tokens)
        if tokens and tokens[-1].ended is not None:
            self._leave(part.slot, request)
        return tokens

    def _sampled(self, part: TokensRead, samples: Samples) -> list[Token]:
        """Adds the sample after the context, and after each draft that the model samples too."""
        row, request = part.row, part.request
        sampled, logprobs = samples.tokens[row].tolist(), samples.logprobs[row].tolist()
        right = agreeing(part.drafts, sampled)
        tokens: list[Token] = []
        for place in range(right + 1):
            ended = request.add(sampled[place])
            top = _top(samples, (row, place), request.request.logprobs)
            tokens.append(Token(request.number, sampled[place], logprobs[place], top, ended))
            if ended is not None:
                break
        self.drafts.count(len(part.drafts), right, len(tokens))
        return tokens

    def _leave(self, slot: int, request: Running) -> None:
        self._pages.release(request.held)
        self._slots[slot] = None

    def _check(self, request: Request) -> None:
        vocabulary = self._model.embedding.table.shape[0]
        if not request.prompt:
            raise ConfigError("the prompt is empty: start it with a begin token")
        if not all(0 <= token < vocabulary for token in request.prompt):
            raise ConfigError(f"the prompt has token ids outside 0 to {vocabulary - 1}: drop them")
        tokens = len(request.prompt) + request.sampling.tokens
        if tokens > self._length:
            raise ConfigError(
                f"prompt and sample are {tokens} tokens, and a request has room for "
                f"{self._length}: shorten one of them"
            )
        if self._pages.of(_most(request)) > self._number:
            raise ConfigError(
                f"prompt and sample are {tokens} tokens, and all pages have room for "
                f"{self._number * self._pages.size}: shorten one of them"
            )
        if not 0 <= request.logprobs <= self._top:
            raise ConfigError(f"logprobs={request.logprobs} must be between 0 and {self._top}")

    def _on_mesh(self) -> Any:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)


def _on_host(samples: Samples) -> Any:
    """Returns samples as arrays of NumPy."""
    # Copies that run beside each other cost more than they save if no device sends them.
    if jax.default_backend() == "cpu":
        return jax.tree.map(np.asarray, samples)
    return jax.device_get(samples)


def _top(samples: Samples, place: tuple[int, int], number: int) -> tuple[tuple[int, float], ...]:
    """Returns the most likely tokens of one sample with their log-probabilities."""
    if not number:
        return ()
    ids, values = (x[place][:number].tolist() for x in (samples.top, samples.top_logprobs))
    return tuple(zip(ids, values, strict=True))


def _most(request: Request) -> int:
    """Returns the largest number of entries of a request; its last token needs none."""
    return len(request.prompt) + request.sampling.tokens - 1


def _pieces(slots: int, prefill: int, mesh: Mesh | None) -> int:
    """Returns the number of pieces of a chunk, a power of two that divides its tokens."""
    if slots < _MANY or (mesh is not None and mesh.size > 1):
        return 1
    number = _MOST_PIECES
    while number > 1 and (prefill % number or prefill // number < _SHORTEST_PIECE):
        number //= 2
    return number


def _sizes(slots: int, prefill: int, pieces: int) -> list[tuple[int, int, int]]:
    """Returns rows, tokens of the chunk and its pieces for all steps.

    All steps on several devices have a row for every slot. On one device some have fewer rows: a
    step of few requests takes the time to read the weights of their experts, and a prompt beside
    which no request runs needs a row for its own sample alone. A chunk is of one request, or in
    pieces, or one piece alone.
    """
    several = [(slots, prefill, pieces), (slots, prefill // pieces, 1)] if pieces > 1 else []
    mesh = jax.sharding.get_abstract_mesh()
    few = _FEW if slots >= _MANY and (mesh.empty or mesh.size == 1) else ()
    fewer = [*((rows, 0, 1) for rows in few), *((rows, prefill, 1) for rows in few[:1])]
    return [(slots, prefill, 1), *several, (slots, 0, 1), *fewer]


def _shapes(
    sizes: Sequence[tuple[int, int, int]], page: int, pages: int, drafts: int
) -> list[StepShape]:
    """Returns the shapes of all steps, for tables of each width.

    A table of a request that reads a chunk alone has room for the tokens of the chunk.
    """
    widths, width = [pages], max(_NARROWEST // page, 1)
    while width < pages:
        widths.append(width)
        width *= _GROWTH

    def least(chunk: int, pieces: int) -> int:
        return min(-(-chunk // page), pages) if pieces == 1 else 1

    found = (
        StepShape(rows, chunk, max(width, least(chunk, pieces)), page, number, pieces)
        for width in widths
        for rows, chunk, pieces in sizes
        for number in sorted({0, drafts})
    )
    return list(dict.fromkeys(found))


def checked(model: Model, length: int) -> Decoder:
    """Returns the model, if an engine can generate so many tokens with it.

    Raises:
        ConfigError: If it cannot.
    """
    check_can_generate(model.config)
    if not isinstance(model, Decoder):
        raise ConfigError("an engine continues prompts and has no encoder: use decoding.translate")
    model.config.check_length(length, "length")
    if any(layer.moe.exchange_buffer is not None for layer in model.config.sparse_layers()):
        raise ConfigError(
            "model.moe.exchange_buffer drops choices by the load of a step, so tokens would depend "
            "on other requests: open the model with exchange_buffer=None"
        )
    return model


def _check_sizes(sizes: dict[str, int], pages: int, logprobs: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name}={size} must be at least 1")
    if sizes["prefill"] < 2:
        raise ConfigError("prefill=1 must be at least 2: every slot reads one token beside it")
    if pages < 0 or logprobs < 0:
        raise ConfigError(f"pages={pages} and logprobs={logprobs} must be at least 0")
