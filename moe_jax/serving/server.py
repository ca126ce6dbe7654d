"""An HTTP server in a thread, which ends in order."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette

from moe_jax.errors import ConfigError, line_of

_TICK = 0.05
# Connections that may be open beside those of requests: pages, metrics, and refused requests.
_MORE_CONNECTIONS = 256
# Seconds of an idle connection. Clients close theirs earlier (httpx after 5), so that none sends a
# request into a connection that the server closes.
_IDLE_SECONDS = 75
# Time in which responses without a request of the generator end.
_LAST_SECONDS = 5


@dataclasses.dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: Address of the server.
    """

    url: str
    _thread: threading.Thread

    @property
    def alive(self) -> bool:
        """True until the server has ended."""
        return self._thread.is_alive()


@contextlib.contextmanager
def running(app: Starlette, host: str, port: int, requests: int) -> Iterator[Server]:
    """Runs a server in the block, and ends it with the block.

    Args:
        app: The application.
        host: Name or address to bind to.
        port: Port; 0 for a free one.
        requests: Largest number of requests that wait or run.

    Raises:
        ConfigError: If the address cannot be bound, or the application does not start.
    """
    with contextlib.closing(_bound(host, port)) as bound:
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                access_log=False,
                log_level="warning",
                limit_concurrency=requests + _MORE_CONNECTIONS,
                timeout_keep_alive=_IDLE_SECONDS,
                timeout_graceful_shutdown=_LAST_SECONDS,
            )
        )
        thread = threading.Thread(target=server.run, args=([bound],), name="server")
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise ConfigError("the server has not started: its log has the reason")
                time.sleep(_TICK)
            yield Server(_url(host, bound.getsockname()[1]), thread)
        finally:
            server.should_exit = True
            thread.join()


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--host={host} --port={port} cannot be bound ({line_of(error)}): choose another port, "
            "or an address of this machine"
        ) from error


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
