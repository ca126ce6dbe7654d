"""The endpoint: OpenAI's API over a generator, as an application of Starlette."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import jinja2
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from moe_jax.errors import ConfigError
from moe_jax.serving import answering, asking, forms, schema
from moe_jax.serving.answering import Accepted, ClientLeft, while_connected
from moe_jax.serving.asking import Served
from moe_jax.serving.bridge import Bridge
from moe_jax.serving.metrics import CONTENT_TYPE, Metrics
from moe_jax.serving.refusal import Refusal
from moe_jax.serving.written import AnswerWriter

Handler = Callable[[HttpRequest], Awaitable[Response]]
Parse = Callable[[schema.Body], schema.Asked]
# OpenAI's default of ``max_tokens`` of completions.
_DEFAULT_TOKENS = 16
# A longer body is read to this multiple of the limit, so that its client sees the answer.
_READ_AHEAD = 16
# The page loads nothing and sends nothing to other hosts.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of the endpoint.

    Attributes:
        body: Largest number of bytes of a body.
        seconds: Longest time in which a body arrives.
        api_key: Key that clients send as bearer token; "" for none.
    """

    body: int = 2**20
    seconds: float = 30.0
    api_key: str = ""


def make_app(served: Served, bridge: Bridge, limits: Limits) -> Starlette:
    """Returns the application; it starts and ends the thread of the bridge."""
    api = _Api(served, bridge, limits)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with bridge.started():
            yield

    chat = api.generation(schema.chat_of, forms.Chat, None)
    completion = api.generation(schema.completion_of, forms.Completion, _DEFAULT_TOKENS)
    routes = [
        api.route("/", api.page, key=False),
        api.route("/health", api.health, key=False),
        api.route("/metrics", api.numbers),
        api.route("/load", api.load),
        api.route("/v1/models", api.models),
        api.route("/v1/models/{name}", api.model),
        api.route("/v1/completions", completion, method="POST"),
        api.route("/v1/chat/completions", chat, method="POST"),
    ]
    handlers: Any = {HTTPException: _http_error, Exception: _own_error}
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)


class _Api:
    """The handlers of all paths."""

    def __init__(self, served: Served, bridge: Bridge, limits: Limits):
        self._served, self._bridge, self._limits = served, bridge, limits
        self._metrics = Metrics(bridge)
        self._created = int(time.time())
        self._page = _page(served.name)

    def route(
        self, path: str, endpoint: Handler, *, method: str = "GET", key: bool = True
    ) -> Route:
        """Returns a route that counts its responses, and writes refusals as JSON.

        Args:
            path: Path of the route.
            endpoint: Function from a request to its response.
            method: Method of HTTP.
            key: False answers clients without the key too.
        """

        async def counted(request: HttpRequest) -> Response:
            try:
                if key:
                    _check_key(self._limits.api_key, request.headers.get("authorization", ""))
                response = await endpoint(request)
            except (ClientLeft, ClientDisconnect):
                response = Response(status_code=499)  # Nobody reads it.
            except Refusal as refusal:
                response = _refused(refusal)
            except ConfigError as error:
                response = _refused(Refusal(400, str(error)))
            self._metrics.respond(path, response.status_code)
            return response

        return Route(path, counted, methods=[method])

    def generation(
        self, parse: Parse, form: type[forms.Completion | forms.Chat], default: int | None
    ) -> Handler:
        """Returns the endpoint of completions or chats; see ``asking.request_of``."""

        async def endpoint(request: HttpRequest) -> Response:
            self._bridge.check()
            asked = parse(schema.parsed(await _body(request, self._limits)))
            found = await asyncio.to_thread(asking.request_of, self._served, asked, default)
            # A client that leaves while the request waits for the next step leaves no request.
            answer = await while_connected(request, self._bridge.submit(found))
            served, wants = self._served, asked.logprobs is not None
            accepted = Accepted(
                self._bridge,
                answer,
                AnswerWriter(served.tokenizer, asked.stop),
                form(served.name, served.tokenizer, wants),
                self._metrics.begin(len(found.prompt)),
                len(found.prompt),
                asked.usage,
            )
            if asked.stream:
                return answering.EventResponse(accepted)
            return await answering.at_once(accepted, request)

        return endpoint

    async def page(self, _: HttpRequest) -> Response:
        """Returns the page to type into."""
        return HTMLResponse(self._page, headers={"Content-Security-Policy": _POLICY})

    async def health(self, _: HttpRequest) -> Response:
        """Returns 200 if new requests start, or wait for others alone; otherwise 503."""
        ends = "draining" if self._bridge.draining else ""
        status = "failed" if self._bridge.failed else ends or "ok"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def numbers(self, _: HttpRequest) -> Response:
        """Returns the numbers for Prometheus."""
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

    async def load(self, _: HttpRequest) -> Response:
        """Returns the numbers of requests, and load and alarms if the generator has them."""
        layers = await self._bridge.load()
        bridge, stream = self._bridge, self._bridge.stream
        numbers = {"waiting": bridge.waiting, "running": bridge.running, "layers": layers}
        return JSONResponse({**numbers, **(stream.record() if stream is not None else {})})

    async def models(self, _: HttpRequest) -> Response:
        """Returns the list of models."""
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def model(self, request: HttpRequest) -> Response:
        """Returns one model."""
        asking.check_model(self._served, request.path_params["name"])
        return JSONResponse(self._described())

    def _described(self) -> dict[str, Any]:
        name, context = self._served.name, self._served.context
        about = {"id": name, "object": "model", "created": self._created, "owned_by": "moe_jax"}
        return {**about, "max_model_len": context}


async def _body(request: HttpRequest, limits: Limits) -> bytes:
    """Returns the body of a request.

    Raises:
        Refusal: If the body is no JSON by its type, too long, or too slow.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A page of another site can send other types without the consent of its visitor.
        raise Refusal(415, "the body has another type: send Content-Type: application/json")
    content, length = bytearray(), 0
    try:
        async with asyncio.timeout(limits.seconds):
            async for chunk in request.stream():
                length += len(chunk)
                if length <= limits.body:
                    content += chunk
                elif length > limits.body * _READ_AHEAD:
                    break
    except TimeoutError as error:
        line = f"the body has not arrived in {limits.seconds:g} seconds: send it again"
        raise Refusal(408, line, headers={"Connection": "close"}) from error
    if length > limits.body:
        line = f"the body has more than {limits.body} bytes: send a shorter prompt"
        raise Refusal(413, line, code="body_too_large", headers={"Connection": "close"})
    return bytes(content)


def _check_key(key: str, header: str) -> None:
    """Rejects a request without the key; the time of the comparison tells nothing about the key."""
    given = header.removeprefix("Bearer ").strip()
    # Headers are bytes, which Starlette decodes as latin-1.
    one, two = (hashlib.sha256(raw).digest() for raw in (key.encode(), given.encode("latin-1")))
    if key and not hmac.compare_digest(one, two):
        line = "the API key is missing or wrong: send Authorization: Bearer KEY"
        scheme = {"WWW-Authenticate": "Bearer"}
        raise Refusal(401, line, code="invalid_api_key", headers=scheme)


def _refused(refusal: Refusal) -> Response:
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


async def _http_error(_: HttpRequest, error: HTTPException) -> Response:
    lines = {404: "there is no such path: see /v1/models", 405: "use another method of HTTP"}
    line = lines.get(error.status_code, error.detail)
    headers = dict(error.headers or {})
    return _refused(Refusal(error.status_code, line, headers=headers))


async def _own_error(_: HttpRequest, __: Exception) -> Response:
    return _refused(Refusal(500, "the server has made an error: its log has the details"))


def _page(name: str) -> str:
    loader = jinja2.PackageLoader("moe_jax.serving", "")
    environment = jinja2.Environment(loader=loader, autoescape=True)
    return environment.get_template("page.html.j2").render(name=name)
