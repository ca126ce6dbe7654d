"""A model behind the endpoint, from its folder to its last answer."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator

from moe_jax.run.opened import FolderModel
from moe_jax.serving import engines
from moe_jax.serving.app import Limits, make_app
from moe_jax.serving.asking import Served
from moe_jax.serving.bridge import Bridge
from moe_jax.serving.engines import Room
from moe_jax.serving.server import Server, running

_TICK = 0.05


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """A running endpoint.

    Attributes:
        server: HTTP server.
        bridge: Bridge to the engine.
    """

    server: Server
    bridge: Bridge

    def wait(self, stopped: Callable[[], object]) -> None:
        """Waits until ``stopped`` returns a true value.

        Raises:
            BaseException: The error of the engine, if it fails.
        """
        while not stopped():
            if self.bridge.failed is not None:
                raise self.bridge.failed
            if not self.server.alive:
                raise RuntimeError("the server has ended: its log has the reason")
            time.sleep(_TICK)

    def drain(self, seconds: float) -> int:
        """Refuses new requests and waits for the others.

        Args:
            seconds: Time after which the others end with an error.

        Returns:
            Number of requests that end with an error.
        """
        self.bridge.draining = True
        last = time.monotonic() + seconds
        while self.bridge.open and time.monotonic() < last and self.server.alive:
            time.sleep(_TICK)
        left = self.bridge.open
        if left:
            self.bridge.abort()
        return left


@contextlib.contextmanager
def offered(
    opened: FolderModel, name: str, room: Room, limits: Limits, host: str, port: int
) -> Iterator[Endpoint]:
    """Runs the endpoint of a model in the block.

    Args:
        opened: The model.
        name: Name of the model for clients.
        room: Room for requests.
        limits: Limits of bodies, and the key.
        host: Name or address to bind to.
        port: Port; 0 for a free one.

    Raises:
        ConfigError: If the context is longer than the positions of the model, or the address
            cannot be bound.
    """
    opened.model.config.check_length(room.context, "--context")
    assert opened.tokenizer is not None  # ``open_folder`` has checked it.
    served = Served(name, opened.tokenizer, opened.vocab_size, room.context)
    requests = room.slots + room.queue
    with opened.on_mesh():
        bridge = Bridge(engines.engine_of(opened, room), requests, opened.on_mesh)
    with running(make_app(served, bridge, limits), host, port, requests) as server:
        yield Endpoint(server, bridge)
