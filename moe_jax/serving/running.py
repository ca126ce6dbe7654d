"""A running request, and the arrays of a step of many."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from moe_jax.serving.pages import Held
from moe_jax.serving.program import StepInputs, StepShape
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
        if token == sampling.eos_id:
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
    """

    slot: int
    request: Running
    number: int
    row: int

    @property
    def ends(self) -> bool:
        """True if the step reads the last token, so that it samples the next one."""
        return self.number == len(self.request.unread)


def parts_of(slots: list[Running | None], chunk: int) -> list[TokensRead]:
    """Returns the tokens of a step: a chunk of the request with several, one of each other."""
    running = [(slot, request) for slot, request in enumerate(slots) if request is not None]
    return [
        TokensRead(slot, request, min(len(request.unread), chunk), row)
        for row, (slot, request) in enumerate(running)
    ]


def inputs_of(parts: list[TokensRead], shape: StepShape) -> StepInputs:
    """Returns the arrays of a step. At most one part has several tokens."""
    inputs: Any = StepInputs.empty(shape)
    for part in parts:
        request, long = part.request, part.number > 1
        first = shape.slots if long else part.row
        start, own = request.held.computed, slice(first, first + part.number)
        places = np.arange(start, start + part.number)
        pages = np.asarray(request.held.pages[: shape.pages], np.int32)
        inputs.tokens[own] = request.unread[: part.number]
        inputs.positions[own], inputs.valid[own] = places, True
        inputs.entries[own] = pages[places // shape.page] * shape.page + places % shape.page
        table = inputs.tables[1][0] if long else inputs.tables[0][part.row]
        table[: len(pages)] = pages
        inputs.ends[part.row] = first + part.number - 1
        _set_rules(inputs, part)
    if shape.chunk:  # Positions of padding go on, so that they reach no page out of reach.
        tail = inputs.positions[shape.slots :]
        tail[:] = tail[0] + np.arange(shape.chunk)
    return inputs


def _set_rules(inputs: Any, part: TokensRead) -> None:
    """Sets the way to sample of one row."""
    sampling, row = part.request.request.sampling, part.row
    inputs.rules.temperature[row] = sampling.temperature
    inputs.rules.top_k[row] = sampling.top_k
    inputs.rules.top_p[row] = sampling.top_p
    inputs.seeds[row] = sampling.seed
    inputs.sampled[row] = part.request.sampled
