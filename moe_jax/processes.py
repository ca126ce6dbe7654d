"""Several processes of one run: how they join, agree, wait for each other and end together.

All of it is JAX's own: `jax.distributed` finds the other processes and watches over them,
`jax.experimental.multihost_utils` lets them agree. See
https://docs.jax.dev/en/latest/multi_process.html.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils
from orbax.checkpoint.multihost import get_barrier_sync_fn

from moe_jax.errors import ConfigError

_JOIN_SECONDS = 300
_HEARTBEAT_SECONDS = 60
# How long the others wait for what the first process does alone: a tokenizer, a report.
_WAIT_SECONDS = 3600
_WATCH_SECONDS, _GRACE_SECONDS = 0.5, 2
_NOTICE = "moe_jax/failed"
_ending = threading.Lock()
# What a collective or the coordination service says when a peer has gone: Gloo, NCCL, gRPC.
_LOSS = ("gloo", "nccl", "coordination", "connection", "socket closed", "unavailable", "heartbeat")


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Where the processes meet; each part that is unset is found by JAX.

    Attributes:
        coordinator: ``HOST:PORT`` of process 0, reachable by all.
        num_processes: of the run.
        process_id: of this one, from 0.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def join(hosts: Hosts) -> None:
    """Joins the processes of a run; must come before anything that looks at devices.

    JAX finds TPU pods, Kubernetes jobs, Slurm and Open MPI by itself
    (https://docs.jax.dev/en/latest/_autosummary/jax.distributed.initialize.html). Collectives
    between CPUs are Gloo's, JAX's default.

    Raises:
        ConfigError: if nothing is found. If not all come within five minutes, JAX ends the process.
    """
    try:
        jax.distributed.initialize(
            hosts.coordinator,
            hosts.num_processes,
            hosts.process_id,
            initialization_timeout=_JOIN_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_WAIT_SECONDS,
        )
    except ValueError as error:
        raise ConfigError(
            f"--distributed finds no TPU pod, Kubernetes, Slurm or Open MPI job ({_line(error)}): "
            "pass --coordinator=HOST:PORT, --num_processes and --process_id to each process"
        ) from error
    except RuntimeError as error:
        raise ConfigError(f"the processes of the run did not meet: {_line(error)}") from error
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(over,), name="watch", daemon=True)
    watch.start()
    # A thread that is inside JAX when the interpreter ends aborts the process.
    atexit.register(lambda: (over.set(), watch.join()))


def is_first() -> bool:
    """Returns whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def agreed(decide: Callable[[], int], failure: type[Exception] = ConfigError) -> int:
    """Returns what ``decide`` says on the first process, on every process.

    Raises:
        Exception: what ``decide`` raised, on the first process.
        failure: on the others, at the same time.
    """
    if jax.process_count() == 1:
        return decide()
    value, error = -1, None
    if is_first():
        try:
            value = decide()
        except Exception as raised:
            error = raised
    # A collective would not wait: Gloo gives up after half a minute.
    get_barrier_sync_fn()(key="agreed", timeout_ms=_WAIT_SECONDS * 1000)
    message = np.array([value, error is not None], np.int32)
    value, failed = (int(x) for x in multihost_utils.broadcast_one_to_all(message))
    if error is not None:
        raise error
    if failed:
        raise failure("the first process of the run has failed; see its message")
    return value


def first(act: Callable[[], object]) -> None:
    """Runs ``act`` on the first process, while the others wait; raises as ``agreed``."""

    def acted() -> int:
        act()
        return 0

    agreed(acted)


@contextlib.contextmanager
def together(remedy: Callable[[], str]) -> Iterator[None]:
    """Ends this process with one line when another one has gone.

    Args:
        remedy: says how to go on.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or not any(mark in str(error).lower() for mark in _LOSS):
            raise
        line = f"another process of this run is gone ({_line(error)}): {remedy()}"
        fail(1, line, told=line)


def fetch(results: Any) -> Any:
    """Returns the arrays that one program made, whole on every device, as NumPy's.

    Raises as soon as one of this process's devices fails: where a process is lost, some devices
    fail at once, and others wait for them for ever.
    """
    if jax.process_count() > 1:
        # What a program makes is ready together.
        parts = jax.tree.leaves(results)[0].addressable_shards
        pool = ThreadPoolExecutor(len(parts), thread_name_prefix="fetch")
        waits = [pool.submit(part.data.block_until_ready) for part in parts]
        pool.shutdown(wait=False)
        for done in as_completed(waits):
            done.result()
    return jax.tree.map(np.asarray, results)


def fail(code: int, line: str, told: str | None = None) -> NoReturn:
    """Prints why the run ends and ends this process; with others, ends them too.

    They may wait for this process in a collective, and so may those that wait for one of them: only
    some see a broken connection. An orderly exit of this process would wait for theirs.

    Args:
        code: exit code of every process.
        line: what this process says, unless another one has failed before it.
        told: what the others say; by default that this process has failed, and the line.
    """
    if not jax.distributed.is_initialized():
        print(f"error: {line}", file=sys.stderr, flush=True)
        sys.exit(code)
    told = told or f"process {jax.process_index()} of this run has failed: {line}"
    try:
        _service().key_value_set(_NOTICE, f"{code} {told}")
    except jax.errors.JaxRuntimeError:
        # A second notice is refused: what failed first is the reason.
        code, line = _notice() or (code, line)
    _end(code, line)


def _watch(over: threading.Event) -> None:
    """Ends this process when another one says that the run has failed."""
    while not over.wait(_WATCH_SECONDS):
        found = _notice()
        if found is not None:
            _end(*found)


def _notice() -> tuple[int, str] | None:
    try:
        code, line = _service().key_value_try_get(_NOTICE).split(" ", 1)
    except jax.errors.JaxRuntimeError:
        # There is none; or no service, and then JAX ends this process.
        return None
    return int(code), line


def _end(code: int, line: str) -> NoReturn:
    if not _ending.acquire(blocking=False):
        # The other thread is about to end both.
        threading.Event().wait()
    print(f"error: {line}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    if jax.process_index() == 0:
        # The service that tells the others is in this process.
        time.sleep(_GRACE_SECONDS)
    os._exit(code)


def _service() -> Any:
    # JAX has no public name for the key-value store of its coordination service.
    return distributed.global_state.client


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
