"""Requests of a load test: good ones of mixed lengths, bad ones, and how a client sends them."""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Iterator
from typing import Any

import httpx

# Longest sample of a request.
_LONGEST = 48


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request of a client.

    Attributes:
        prompt: Token ids of the prompt.
        tokens: Largest number of sampled tokens.
        temperature: Temperature of sampling; 0 is greedy.
        seed: Seed of the sample.
        stream: True if the answer comes as a stream.
        leaves: True if the client leaves after the first part of the stream.
    """

    prompt: tuple[int, ...]
    tokens: int
    temperature: float
    seed: int
    stream: bool
    leaves: bool = False

    @property
    def body(self) -> dict[str, Any]:
        """The body of the request."""
        usage = {"stream_options": {"include_usage": True}} if self.stream else {}
        return {
            "prompt": list(self.prompt),
            "max_tokens": self.tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "stream": self.stream,
            **usage,
        }


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer that a client got.

    Attributes:
        ask: The request.
        text: Text of the answer.
        tokens: Number of sampled tokens.
        ended: True if the answer came to its end.
        first: Time to the first part in seconds.
        seconds: Time to the end in seconds.
        problem: Status or error in place of an answer.
    """

    ask: Ask
    text: str
    tokens: int
    ended: bool
    first: float
    seconds: float
    problem: str = ""


def asks(number: int, context: int, vocabulary: int) -> list[Ask]:
    """Returns distinct requests: half greedy, half as streams, one in eight with a long prompt."""
    rng = random.Random(0)
    found = []
    for i in range(number):
        tokens = rng.randint(1, _LONGEST)
        longest = context - tokens if i % 8 == 0 else 32
        prompt = tuple(rng.randrange(3, vocabulary) for _ in range(rng.randint(1, longest)))
        temperature = 0.0 if i % 2 else rng.choice([0.7, 1.0])
        found.append(Ask(prompt, tokens, temperature, rng.randrange(2**31), stream=i % 4 < 2))
    return found


async def sent(http: httpx.AsyncClient, ask: Ask) -> Answer:
    """Sends a request; an answer with another status than 200 has not ended."""
    began = time.monotonic()
    try:
        if ask.stream:
            return await _streamed(http, ask, began)
        response = await http.post("/v1/completions", json=ask.body)
    except httpx.HTTPError as error:
        return Answer(ask, "", 0, False, 0.0, 0.0, repr(error))
    seconds = time.monotonic() - began
    if response.status_code != 200:
        problem = f"status {response.status_code}"
        return Answer(ask, "", 0, False, seconds, seconds, problem)
    found = response.json()
    (choice,), tokens = found["choices"], found["usage"]["completion_tokens"]
    return Answer(ask, choice["text"], tokens, True, seconds, seconds)


async def _streamed(http: httpx.AsyncClient, ask: Ask, began: float) -> Answer:
    """Reads a stream to its end, or to its first part if the client leaves."""
    text, tokens, first = "", 0, 0.0
    async with http.stream("POST", "/v1/completions", json=ask.body) as response:
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            first = first or time.monotonic() - began
            if ask.leaves:
                return Answer(ask, "", 0, False, first, first)
            if line == "data: [DONE]":
                return Answer(ask, text, tokens, True, first, time.monotonic() - began)
            part = json.loads(line.removeprefix("data: "))
            text += "".join(choice["text"] for choice in part.get("choices", ()))
            tokens = (part.get("usage") or {}).get("completion_tokens", tokens)
        problem = f"a stream without its end, with status {response.status_code}"
        return Answer(ask, text, tokens, False, first, time.monotonic() - began, problem)


def mistakes(number: int, context: int) -> Iterator[bytes]:
    """Yields the bodies of bad requests: no JSON, no UTF-8, huge prompts, no tokens to sample."""
    rng = random.Random(2)
    good = b'{"prompt": [3, 4], "max_tokens": 4}'
    for i in range(number):
        longer = rng.randrange(context + 1, 50 * context)
        yield (
            good[: rng.randrange(1, len(good))],
            b'{"prompt": "\xff' + rng.randbytes(rng.randrange(1, 200)) + b'"}',
            json.dumps({"prompt": [3] * longer}).encode(),
            json.dumps({"prompt": "t5 " * 2**19}).encode() if i < 50 else b'{"prompt": 1e999}',
            b'{"prompt": [3], "max_tokens": 0}',
            b'{"prompt": [3], "max_tokens": -1}',
            b'{"prompt": [3], "n": ' + str(rng.randrange(2, 10**6)).encode() + b"}",
            b'{"prompt": "\\ud800"}',
            b"[" * rng.randrange(1, 50_000),
            b'{"prompt": [999999], "stream": true}',
        )[i % 10]
