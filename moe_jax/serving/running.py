"""A running request, and the arrays of a step of many."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from moe_jax.serving.pages import Held
from moe_jax.serving.program import Samples, StepInputs, StepShape
from moe_jax.serving.request import Ended, Request


@dataclasses.dataclass
class Running:
    """A request with its tokens and their entries.

    Attributes:
        number: Number of the request.
        request: The request.
        held: Pages of its entries; those of the first ``held.computed`` tokens are filled.
        tokens: Token ids of the prompt and of the sample up to now.
    """

    number: int
    request: Request
    held: Held
    tokens: list[int]

    @property
    def sampled(self) -> int:
        """Number of sampled tokens."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def unread(self) -> list[int]:
        """Token ids without entries, at least one."""
        return self.tokens[self.held.computed :]

    def add(self, token: int) -> Ended | None:
        """Adds a sampled token and returns the reason for the end, if it is the last one."""
        self.tokens.append(token)
        sampling = self.request.sampling
        if token in sampling.eos_ids:
            return Ended.END
        return Ended.LENGTH if self.sampled == sampling.tokens else None


@dataclasses.dataclass(frozen=True)
class TokensRead:
    """The tokens that one step reads of a request.

    Attributes:
        slot: Slot of the request.
        request: The request.
        number: Number of its tokens that the step reads.
        row: Row of the request in the step.
        drafts: Drafted tokens that the step reads after them.
        piece: First piece of the chunk that has its tokens, if they are several.
    """

    slot: int
    request: Running
    number: int
    row: int
    drafts: tuple[int, ...] = ()
    piece: int = 0

    @property
    def end(self) -> int:
        """Number of tokens of the request that have entries after the step."""
        return self.request.held.computed + self.number + len(self.drafts)

    @property
    def ends(self) -> bool:
        """True if the step reads the last token, so that it samples the next one."""
        return self.request.held.computed + self.number == len(self.request.tokens)

    def first(self, shape: StepShape) -> int:
        """Returns the index of its first token in a step."""
        if self.number > 1:
            return shape.before_chunk + self.piece * shape.piece
        return self.row * shape.each

    def pieces(self, size: int) -> int:
        """Returns the number of pieces of ``size`` tokens that hold its tokens; 0 for one token."""
        return -(-self.number // size) if self.number > 1 else 0

    def room(self, most: int) -> int:
        """Returns the number of drafts that it may have: the last token is never a draft."""
        left = self.request.request.sampling.tokens - self.request.sampled - 1
        return min(most, left) if self.ends and self.number == 1 else 0


@dataclasses.dataclass(frozen=True)
class StepDone:
    """A step that the model has computed.

    Attributes:
        parts: Tokens of the step by request, which do not have the samples yet.
        inputs: Arrays of the step.
        shape: Shapes of the step.
        samples: Samples of the step, in the memory of the device.
    """

    parts: Sequence[TokensRead]
    inputs: StepInputs
    shape: StepShape
    samples: Samples


def parts_of(slots: Sequence[Running | None], chunk: int, pieces: int = 1) -> list[TokensRead]:
    """Returns the tokens of a step: one of each request, or several in pieces of the chunk.

    Requests with several unread tokens get pieces in the order of their numbers, each as many as
    it fills. Requests for which no piece is left read nothing.

    Args:
        slots: Requests by slot.
        chunk: Number of tokens of all pieces.
        pieces: Number of pieces.
    """
    running = [(slot, request) for slot, request in enumerate(slots) if request is not None]
    size, start, own = chunk // pieces, 0, {}
    for slot, request in sorted(running, key=lambda each: each[1].number):
        number = min(len(request.unread), (pieces - start) * size)
        if len(request.unread) == 1:
            own[slot] = TokensRead(slot, request, 1, 0)
        elif number:
            own[slot] = TokensRead(slot, request, number, 0, piece=start)
            start += own[slot].pieces(size)
    return [dataclasses.replace(own[slot], row=row) for row, slot in enumerate(sorted(own))]


def shape_for(shapes: Iterable[StepShape], parts: Sequence[TokensRead]) -> StepShape:
    """Returns the shape with the fewest tokens that holds those of a step."""
    long = [part for part in parts if part.number > 1]
    drafts = max(len(part.drafts) for part in parts)
    end = max(part.end for part in parts)

    def holds(each: StepShape) -> bool:
        if bool(each.chunk) != bool(long):
            return False
        return len(long) <= 1 or each.pieces > 1

    fitting = (
        each
        for each in shapes
        if holds(each)
        and each.chunk >= max((part.number for part in long), default=0)
        and each.drafts >= drafts
        and each.pages * each.page >= end
        and each.slots >= len(parts)
    )
    return min(fitting, key=lambda each: (each.tokens, each.pieces, each.pages))


def inputs_of(parts: Sequence[TokensRead], shape: StepShape) -> StepInputs:
    """Returns the arrays of a step; part ``i`` has row ``i``."""
    inputs: Any = StepInputs.empty(shape)
    for part in parts:
        _set_tokens(inputs, part, shape)
    # Positions of padding go on, so that they reach no page out of reach.
    slots, chunk = np.split(inputs.positions, [shape.before_chunk])
    for rows in (slots.reshape(shape.slots, shape.each), chunk.reshape(-1, max(shape.piece, 1))):
        rows[:] = rows[:, :1] + np.arange(rows.shape[1])
    _set_rules(inputs, [part.request for part in parts])
    return inputs


def _set_tokens(inputs: Any, part: TokensRead, shape: StepShape) -> None:
    """Sets the tokens of one request and their entries."""
    request, first, page = part.request, part.first(shape), shape.page
    start, pages = request.held.computed, request.held.pages[: shape.pages]
    own = slice(first, first + part.end - start)
    inputs.tokens[own] = [*request.tokens[start : start + part.number], *part.drafts]
    inputs.positions[own], inputs.valid[own] = range(start, part.end), True
    inputs.entries[own] = [pages[p // page] * page + p % page for p in range(start, part.end)]
    if part.number > 1:
        end = part.piece + part.pieces(shape.piece)
        inputs.tables[1][part.piece : end, : len(pages)] = pages
    else:
        inputs.tables[0][part.row, : len(pages)] = pages
    last = first + part.number - 1
    inputs.ends[part.row] = [min(last + i, own.stop - 1) for i in range(shape.each)]


def _set_rules(inputs: Any, requests: Sequence[Running]) -> None:
    """Sets the ways to sample of all rows."""
    rules, rows, own = inputs.rules, len(requests), [each.request.sampling for each in requests]
    rules.temperature[:rows] = [sampling.temperature for sampling in own]
    rules.top_k[:rows] = [sampling.top_k for sampling in own]
    rules.top_p[:rows] = [sampling.top_p for sampling in own]
    inputs.seeds[:rows] = [sampling.seed for sampling in own]
    inputs.sampled[:rows] = [each.sampled for each in requests]
    inputs.ranked[...] = any(each.request.logprobs for each in requests)
