"""Requests, the tokens that answer them, and the interface of an engine."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Protocol

from moe_jax.decoding import Sampling


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and the way to sample its continuation.

    Attributes:
        prompt: Token ids, at least one.
        sampling: Settings of sampling; its ``seed`` alone decides the samples of the request.
        logprobs: Number of most likely tokens whose log-probabilities are returned at each step; 0
            for the sampled token alone.
    """

    prompt: tuple[int, ...]
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    logprobs: int = 0


class Ended(enum.Enum):
    """The reason why a request has its last token; the values are OpenAI's names."""

    END = "stop"
    LENGTH = "length"


@dataclasses.dataclass(frozen=True)
class Token:
    """A sampled token of a request.

    Attributes:
        request: Number that ``submit`` returned.
        token: Id of the token.
        logprob: Natural logarithm of its probability at temperature 1.
        top: Most likely token ids with their log-probabilities, most likely first.
        ended: Reason for the end, if this is the last token.
    """

    request: int
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    ended: Ended | None = None


class Generator(Protocol):
    """An engine: requests join and leave between its steps. One thread calls it."""

    def submit(self, request: Request) -> int:
        """Queues a request and returns its number.

        Raises:
            ConfigError: If the prompt is empty, holds ids outside the vocabulary, or does not fit
                with its sample into the cache.
        """

    def cancel(self, number: int) -> None:
        """Forgets a request, waiting or running, and frees its entries at once."""

    def step(self) -> Sequence[Token]:
        """Computes one step of the running requests; returns their new tokens."""

    @property
    def waiting(self) -> int:
        """Number of requests that have no entries yet."""

    @property
    def running(self) -> int:
        """Number of requests that have entries."""
