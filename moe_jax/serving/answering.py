"""Responses to accepted requests: at once, or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from moe_jax.serving.bridge import Answer, Bridge
from moe_jax.serving.forms import DONE, Form, Json, event, usage, whole
from moe_jax.serving.metrics import Stopwatch
from moe_jax.serving.refusal import Refusal
from moe_jax.serving.written import AnswerWriter, TextPart

Result = TypeVar("Result")


class ClientLeft(Exception):
    """The client has closed its connection."""


@dataclasses.dataclass
class Accepted:
    """An accepted request.

    Attributes:
        bridge: Bridge to the generator.
        answer: Tokens of the request.
        writer: Writer of the text.
        form: Form of the response.
        watch: Watch of the tokens.
        prompt: Number of tokens of the prompt.
        usage: Whether a stream ends with the numbers of tokens.
    """

    bridge: Bridge
    answer: Answer
    writer: AnswerWriter
    form: Form
    watch: Stopwatch
    prompt: int
    usage: bool
    _reason: str | None = None

    async def parts(self) -> AsyncGenerator[TextPart, None]:
        """Yields the parts of the answer up to its end."""
        async with contextlib.aclosing(self.answer.tokens()) as tokens:
            async for token in tokens:
                self.watch.token()
                part = self.writer.push(token)
                self._reason = part.reason
                yield part
                if part.reason:
                    return

    def close(self) -> None:
        """Frees the entries of the request, and counts it."""
        self.bridge.cancel(self.answer)
        self.watch.end(self._reason)

    def numbers(self) -> Json:
        """Returns the numbers of tokens up to now."""
        return usage(self.prompt, self.watch.sampled)


async def at_once(accepted: Accepted, request: HttpRequest) -> Response:
    """Returns the whole answer.

    Raises:
        ClientLeft: If the client closes its connection first.
        Refusal: If the generator fails.
    """
    try:
        parts = await while_connected(request, _all(accepted))
    finally:
        accepted.close()
    choice = accepted.form.choice(whole(parts), stream=False)
    head = accepted.form.head(stream=False)
    return JSONResponse({**head, "choices": [choice], "usage": accepted.numbers()})


async def _all(accepted: Accepted) -> list[TextPart]:
    return [part async for part in accepted.parts()]


async def while_connected(request: HttpRequest, work: Awaitable[Result]) -> Result:
    """Returns the result of ``work``, which ends with the connection of the client.

    Raises:
        ClientLeft: If the client closes its connection first.
    """
    task, left = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        for one in (task, left):
            one.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


async def _left(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventResponse(StreamingResponse):
    """A stream of server-sent events, which frees its request however it ends."""

    def __init__(self, accepted: Accepted):
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(_events(accepted), media_type="text/event-stream", headers=headers)
        self._close: Callable[[], Any] = accepted.close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def _events(accepted: Accepted) -> AsyncGenerator[str, None]:
    head = accepted.form.head(stream=True)
    unknown = {"usage": None} if accepted.usage else {}
    first = accepted.form.first()
    if first:
        yield event({**head, "choices": [first], **unknown})
    try:
        async with contextlib.aclosing(accepted.parts()) as parts:
            async for part in parts:
                choice = accepted.form.choice(part, stream=True)
                if part.text or part.reason or choice["logprobs"]:
                    yield event({**head, "choices": [choice], **unknown})
    except Refusal as refusal:
        yield event(refusal.body)
        return
    if accepted.usage:
        yield event({**head, "choices": [], "usage": accepted.numbers()})
    yield DONE
