"""Several processes of one run: they join, agree, wait for each other and end together.

JAX does the work: ``jax.distributed`` finds the other processes and watches them, and
``jax.experimental.multihost_utils`` sends values between them. See
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

from moe_jax.errors import ConfigError, line_of

_JOIN_SECONDS = 300
_HEARTBEAT_SECONDS = 60
# Longest time that the other processes wait for work of the first one, such as a tokenizer.
_WAIT_SECONDS = 3600
_WATCH_SECONDS, _GRACE_SECONDS = 0.5, 2
_NOTICE = "moe_jax/failed"
_ending = threading.Lock()
# Words in the errors of a collective or of the coordination service when another process has ended
# (Gloo, NCCL, gRPC).
_LOSS = ("gloo", "nccl", "coordination", "connection", "socket closed", "unavailable", "heartbeat")


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The processes of a run; JAX finds every attribute that is ``None``.

    Attributes:
        coordinator: Address ``HOST:PORT`` of process 0, which all processes can reach.
        num_processes: Number of processes of the run.
        process_id: Index of this process, from 0.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def check_one_process(work: str) -> None:
    """Rejects several processes where one has to do all the work.

    Args:
        work: Subject and verb of the work, such as ``a change of a model runs``.

    Raises:
        ConfigError: If there are several processes.
    """
    if jax.process_count() > 1:
        raise ConfigError(
            f"{work} in one process, and here are {jax.process_count()}: start it once, on one host"
        )


def join(hosts: Hosts) -> None:
    """Joins the processes of a run; a program calls it before it uses any device.

    JAX detects TPU pods, Kubernetes jobs, Slurm and Open MPI
    (https://docs.jax.dev/en/latest/_autosummary/jax.distributed.initialize.html). Gloo, JAX's
    default, runs the collectives between CPUs. If a process is missing after five minutes, JAX ends
    this process.

    Args:
        hosts: The processes.

    Raises:
        ConfigError: If JAX detects no such job, or the processes cannot connect.
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
            "--distributed finds no TPU pod, Kubernetes, Slurm or Open MPI job "
            f"({line_of(error)}): pass --coordinator=HOST:PORT, --num_processes and --process_id "
            "to each process"
        ) from error
    except RuntimeError as error:
        raise ConfigError(f"the processes of the run did not meet: {line_of(error)}") from error
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(over,), name="watch", daemon=True)
    watch.start()

    def end_watch() -> None:
        over.set()
        watch.join()

    # A thread that is inside JAX when the interpreter ends aborts the process.
    atexit.register(end_watch)


def is_first() -> bool:
    """Returns True in the first process of the run, which writes and prints."""
    return jax.process_index() == 0


def agreed(decide: Callable[[], int], failure: type[Exception] = ConfigError) -> int:
    """Runs ``decide`` on the first process and returns its result on every process.

    Args:
        decide: Function of the first process.
        failure: Type of the error in the other processes.

    Raises:
        Exception: In the first process, the error that ``decide`` raised.
        failure: In the other processes, at the same time.
    """
    if jax.process_count() == 1:
        return decide()
    value, error = -1, None
    if is_first():
        try:
            value = decide()
        except Exception as raised:
            error = raised
    # A collective alone would wait too short a time: Gloo raises an error after half a minute.
    get_barrier_sync_fn()(key="agreed", timeout_ms=_WAIT_SECONDS * 1000)
    message = np.array([value, error is not None], np.int32)
    value, failed = (int(x) for x in multihost_utils.broadcast_one_to_all(message))
    if error is not None:
        raise error
    if failed:
        raise failure("the first process of the run has failed; see its message")
    return value


def first(act: Callable[[], object]) -> None:
    """Runs ``act`` on the first process while the other processes wait.

    Raises:
        Exception: In the first process, the error that ``act`` raised.
        ConfigError: In the other processes, at the same time.
    """

    def acted() -> int:
        act()
        return 0

    agreed(acted)


@contextlib.contextmanager
def together(remedy: Callable[[], str]) -> Iterator[None]:
    """Ends this process with one line if another process of the run has ended.

    Args:
        remedy: Function that returns the advice at the end of the line.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or not any(mark in str(error).lower() for mark in _LOSS):
            raise
        line = f"another process of this run is gone ({line_of(error)}): {remedy()}"
        fail(1, line, notice=line)


def fetch(results: Any) -> Any:
    """Returns the results of one program as NumPy arrays; every device holds all of each array.

    The function raises an error as soon as one device of this process fails: after the loss of a
    process some devices fail at once, and the other devices would wait forever.

    Args:
        results: A pytree of arrays.
    """
    if jax.process_count() > 1:
        # All results of a program are ready at the same time.
        parts = jax.tree.leaves(results)[0].addressable_shards
        pool = ThreadPoolExecutor(len(parts), thread_name_prefix="fetch")
        waits = [pool.submit(part.data.block_until_ready) for part in parts]
        pool.shutdown(wait=False)
        for done in as_completed(waits):
            done.result()
    return jax.tree.map(np.asarray, results)


def fail(code: int, line: str, notice: str | None = None) -> NoReturn:
    """Prints why the run ends, and ends all processes of the run.

    Other processes may be blocked in a collective, directly or through each other, and only some
    notice a broken connection. An orderly exit of this process would wait for their exit.

    Args:
        code: Exit code of every process.
        line: Line that this process prints, unless another process has failed before it.
        notice: Line that the other processes print; ``None`` says that this process has failed, and
            why.
    """
    if not jax.distributed.is_initialized():
        print(f"error: {line}", file=sys.stderr, flush=True)
        sys.exit(code)
    notice = notice or f"process {jax.process_index()} of this run has failed: {line}"
    try:
        _service().key_value_set(_NOTICE, f"{code} {notice}")
    except jax.errors.JaxRuntimeError:
        # The service rejects a second notice: the first failure is the reason.
        code, line = _notice() or (code, line)
    _end(code, line)


def _watch(over: threading.Event) -> None:
    """Ends this process after another process has set a notice that the run has failed."""
    while not over.wait(_WATCH_SECONDS):
        notice = _notice()
        if notice is not None:
            _end(*notice)


def _notice() -> tuple[int, str] | None:
    """Returns the exit code and the line of the notice that the run has failed, if it is set."""
    try:
        code, line = _service().key_value_try_get(_NOTICE).split(" ", 1)
    except jax.errors.JaxRuntimeError:
        # The notice is not set; or the service has ended, and then JAX ends this process.
        return None
    return int(code), line


def _end(code: int, line: str) -> NoReturn:
    if not _ending.acquire(blocking=False):
        # Another thread is about to end the process.
        threading.Event().wait()
    print(f"error: {line}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    if jax.process_index() == 0:
        # The service from which the other processes read the notice runs in this process.
        time.sleep(_GRACE_SECONDS)
    os._exit(code)


def _service() -> Any:
    # JAX has no public name for the key-value store of its coordination service.
    return distributed.global_state.client
