"""A thread that owns a generator, and the event loop that asks it."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

from moe_jax.offload import OffloadCounts
from moe_jax.serving.refusal import Refusal
from moe_jax.serving.request import Generator, Request, Token
from moe_jax.serving.speculation import Drafts
from moe_jax.serving.stream import StreamState

Result = TypeVar("Result")
_RETRY = {"Retry-After": "1"}


@runtime_checkable
class ShowsLoad(Protocol):
    """A generator that counts the tokens of experts."""

    @property
    def load(self) -> Any:
        """Numbers of tokens of the experts of each mixture layer, ``(layers, E)``."""


@runtime_checkable
class CountsDrafts(Protocol):
    """A generator that counts drafted tokens."""

    @property
    def drafts(self) -> Drafts:
        """Counts of drafted tokens."""


@runtime_checkable
class CountsExperts(Protocol):
    """A generator that may hold few of its experts on the device."""

    @property
    def offloaded(self) -> OffloadCounts | None:
        """Counts of the experts that layers asked for; ``None`` if all are on the device."""


@runtime_checkable
class ShowsAlarms(Protocol):
    """A generator that may judge the tokens that it reads."""

    @property
    def stream(self) -> StreamState | None:
        """Alarms of the tokens; ``None`` without rules."""


class Answer:
    """The tokens of a request, as they come.

    Attributes:
        number: Number of the request in the generator; -1 before the generator has it.
    """

    def __init__(self) -> None:
        self.number = -1
        self._came = asyncio.Queue[Token | BaseException]()

    def give(self, token: Token | BaseException) -> None:
        """Adds the next token, or the error that ends the answer."""
        self._came.put_nowait(token)

    async def tokens(self) -> AsyncGenerator[Token, None]:
        """Yields tokens to the last one.

        Raises:
            Refusal: If the generator has failed.
        """
        ended = False
        while not ended:
            token = await self._came.get()
            if isinstance(token, BaseException):
                raise token
            ended = token.ended is not None
            yield token


class Bridge:
    """A thread that steps a generator, and answers on an event loop.

    All calls of the generator are in one thread, between its steps. Methods of this class belong to
    the event loop, except those that say otherwise.

    Attributes:
        waiting: Number of requests that wait, after the last step.
        running: Number of requests that run, after the last step.
        draining: True refuses new requests; any thread may set it.
        failed: Error of the generator, after which every request is refused.
    """

    def __init__(
        self,
        generator: Generator,
        most: int,
        within: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ):
        """Wraps a generator.

        Args:
            generator: Generator, which only this bridge may call from now on.
            most: Largest number of requests that wait or run.
            within: Function that returns the context of all steps, such as a mesh.
        """
        self.waiting = self.running = 0
        self.draining = False
        self.failed: BaseException | None = None
        self._generator, self._most, self._within = generator, most, within
        self._commands = queue.SimpleQueue[Callable[[], None] | None]()
        self._numbered = dict[int, Answer]()  # of the thread
        self._open = set[Answer]()  # of the event loop
        self._thread = threading.Thread(target=self._work, name="generator", daemon=True)

    @contextlib.asynccontextmanager
    async def started(self) -> AsyncIterator[None]:
        """Runs the thread in the block."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        try:
            yield
        finally:
            self._commands.put(None)
            await asyncio.to_thread(self._thread.join)

    @property
    def open(self) -> int:
        """Number of requests without an end; any thread may read it."""
        return len(self._open)

    def check(self) -> None:
        """Rejects a request that cannot start now.

        Raises:
            Refusal: With status 503 or 429.
        """
        if self.failed is not None:
            raise Refusal(503, "the model has failed: start the server again", code="failed")
        if self.draining:
            raise Refusal(503, "the server ends: ask another one", code="draining", headers=_RETRY)
        if len(self._open) >= self._most:
            line = f"{self._most} requests wait or run already: try again later"
            raise Refusal(429, line, code="queue_full", headers=_RETRY)

    async def submit(self, request: Request) -> Answer:
        """Gives a request to the generator.

        Raises:
            Refusal: If the request cannot start now; see ``check``.
            ConfigError: If the generator rejects the request.
        """
        self.check()
        answer = Answer()
        self._open.add(answer)
        try:
            await self._ask(lambda: self._number(answer, request))
        except BaseException:
            self.cancel(answer)
            raise
        return answer

    def cancel(self, answer: Answer) -> None:
        """Forgets an answer, with its request in the generator; an ended answer stays as it is."""
        if answer in self._open:
            self._open.discard(answer)
            self._commands.put(lambda: self._forget(answer))

    @property
    def drafts(self) -> Drafts | None:
        """Counts of drafted tokens, or ``None`` if the generator drafts none; for any thread."""
        generator = self._generator
        return generator.drafts if isinstance(generator, CountsDrafts) else None

    @property
    def offloaded(self) -> OffloadCounts | None:
        """Counts of the experts that layers asked for, or ``None``; for any thread."""
        generator = self._generator
        return generator.offloaded if isinstance(generator, CountsExperts) else None

    @property
    def stream(self) -> StreamState | None:
        """Alarms of the tokens that the generator has read, or ``None``; for any thread."""
        generator = self._generator
        return generator.stream if isinstance(generator, ShowsAlarms) else None

    def abort(self) -> None:
        """Ends all answers with an error; any thread may call it."""
        self._post(self._end, Refusal(503, "the server has ended first: ask again", code="ended"))

    async def load(self) -> list[list[float]] | None:
        """Returns the load of experts ``(layers, E)``, or ``None`` if the generator has none."""
        generator = self._generator
        if not isinstance(generator, ShowsLoad) or self.failed is not None:
            return None
        shows: ShowsLoad = generator
        return await self._ask(lambda: [[float(n) for n in layer] for layer in shows.load])

    async def _ask(self, command: Callable[[], Result]) -> Result:
        """Returns the result of a command in the thread."""
        future = self._loop.create_future()
        self._commands.put(lambda: self._answer(future, command))
        return await future

    # Methods of the thread.

    def _work(self) -> None:
        try:
            with self._within():
                while self._obey():
                    tokens = self._generator.step()
                    self._look()
                    self._send(tokens)
        except BaseException as error:
            self.failed = error
            self._post(self._end, Refusal(500, "the model has failed", code="failed"))
            while command := self._commands.get():
                command()

    def _obey(self) -> bool:
        """Obeys commands until there is a step to compute; returns False at the last command."""
        while True:
            self._look()
            idle = not (self.waiting or self.running)
            try:
                command = self._commands.get(block=idle)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def _look(self) -> None:
        self.waiting, self.running = self._generator.waiting, self._generator.running

    def _send(self, tokens: Any) -> None:
        pairs = []
        for token in tokens:
            answer = self._numbered.get(token.request)
            if answer is None:
                continue
            pairs.append((answer, token))
            if token.ended:
                del self._numbered[token.request]
        if pairs:
            self._post(self._deliver, pairs)

    def _answer(self, future: asyncio.Future[Any], command: Callable[[], Any]) -> None:
        try:
            result = command()
        except Exception as error:
            self._post(_settle, future, future.set_exception, error)
        else:
            self._post(_settle, future, future.set_result, result)

    def _number(self, answer: Answer, request: Request) -> None:
        if self.failed is not None:
            raise Refusal(503, "the model has failed: start the server again", code="failed")
        answer.number = self._generator.submit(request)
        self._numbered[answer.number] = answer

    def _forget(self, answer: Answer) -> None:
        if self._numbered.pop(answer.number, None) is not None and self.failed is None:
            self._generator.cancel(answer.number)

    def _post(self, function: Callable[..., None], *arguments: Any) -> None:
        self._loop.call_soon_threadsafe(function, *arguments)

    # Callbacks of the thread on the event loop.

    def _deliver(self, pairs: list[tuple[Answer, Token]]) -> None:
        for answer, token in pairs:
            answer.give(token)
            if token.ended:
                self._open.discard(answer)

    def _end(self, refusal: Refusal) -> None:
        for answer in [*self._open]:
            answer.give(refusal)
            self.cancel(answer)


def _settle(future: asyncio.Future[Any], settle: Callable[[Any], None], value: Any) -> None:
    if not future.done():
        settle(value)
