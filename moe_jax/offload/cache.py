"""The experts that a device holds within a budget of bytes; the others are in a store."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import jax
from jaxtyping import Array

from moe_jax.errors import ConfigError
from moe_jax.offload.policy import Clock, Policy
from moe_jax.offload.store import ExpertArrays, ExpertId, Store

_Value = TypeVar("_Value")
DeviceArrays = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class OffloadCounts:
    """Counts of a cache since it was made.

    Attributes:
        wanted: Experts that layers asked for.
        hits: Experts among them that the device held when they were asked for.
        loads: Experts that were loaded, those of wrong predictions included.
        bytes_moved: Bytes of these loads.
        stall_seconds: Time in which a layer waited for its experts.
        predicted: Experts that were predicted for layers that were then computed.
        right: Experts among them that their layer asked for.
    """

    wanted: int = 0
    hits: int = 0
    loads: int = 0
    bytes_moved: int = 0
    stall_seconds: float = 0.0
    predicted: int = 0
    right: int = 0

    @property
    def hit_rate(self) -> float:
        """Hits over wanted experts; 1 if no expert was wanted."""
        return self.hits / self.wanted if self.wanted else 1.0

    @property
    def accuracy(self) -> float:
        """Right over predicted experts; 1 if no expert was predicted."""
        return self.right / self.predicted if self.predicted else 1.0

    @property
    def foreseen(self) -> float:
        """Right predictions over wanted experts; 1 if no expert was wanted."""
        return self.right / self.wanted if self.wanted else 1.0


class ExpertCache:
    """Holds the experts of a model on the device within a budget of bytes.

    One forward pass at a time takes experts. Loads run in background threads. The budget covers the
    arrays of held experts and of experts that are being loaded; an array that a caller keeps, or
    that the device still computes with, takes memory until it is free.

    Examples:
        >>> import numpy as np
        >>> from moe_jax.offload import ExpertCache, HostStore, LeastRecentlyUsed
        >>> expert = {"up": np.ones((4, 2), np.float32)}  # 32 bytes
        >>> cache = ExpertCache(HostStore([[expert] * 3]), 64, LeastRecentlyUsed())
        >>> [index for index, _ in cache.take(0, [0, 1])]
        [0, 1]
        >>> [index for index, _ in cache.take(0, [0, 1, 2])]
        [0, 1, 2]
        >>> cache.counts.hits, cache.counts.loads, cache.held
        (2, 3, ((0, 1), (0, 2)))
    """

    def __init__(
        self,
        store: Store,
        budget: int,
        policy: Policy,
        *,
        put: Callable[[ExpertArrays], DeviceArrays] = jax.device_put,
        workers: int = 1,
    ):
        """Starts with no expert on the device.

        Args:
            store: All experts.
            budget: Largest number of bytes of experts on the device.
            policy: Chooses the experts that leave.
            put: Copies the arrays of an expert to the device.
            workers: Number of threads that load; with 0, the calling thread loads, and a prefetch
                ends when its experts are there.

        Raises:
            ConfigError: If an expert is larger than the budget.
        """
        _check_budget(store, budget)
        self._store, self._budget, self._policy, self._put = store, budget, policy, put
        self._pool: Executor = ThreadPoolExecutor(workers, "experts") if workers else _AtOnce()
        self._lock = threading.RLock()
        self._held: dict[ExpertId, DeviceArrays] = {}
        self._loading: dict[ExpertId, Future[None]] = {}
        self._used: dict[ExpertId, int] = {}
        self._wanted: set[ExpertId] = set()  # asked for, and not yet given to the caller
        self._predicted: dict[int, set[int]] = {}
        self._layer = self._time = 0
        self._counts = OffloadCounts()

    @property
    def counts(self) -> OffloadCounts:
        """Counts until now."""
        with self._lock:
            return self._counts

    @property
    def held(self) -> tuple[ExpertId, ...]:
        """Experts on the device, sorted."""
        with self._lock:
            return tuple(sorted(self._held))

    @property
    def nbytes(self) -> int:
        """Bytes of the experts that are on the device or are being loaded."""
        with self._lock:
            return sum(self._store.nbytes(each) for each in (*self._held, *self._loading))

    def take(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, DeviceArrays]]:
        """Yields experts of a layer and their arrays, each as soon as the device holds it.

        Experts that are on the device come first, while the others load. An expert may leave when
        the next one is asked for.

        Args:
            layer: MoE layer.
            experts: Its experts; each is yielded once.

        Raises:
            ConfigError: If an expert cannot be read.
        """
        wanted = [(layer, expert) for expert in dict.fromkeys(experts)]
        rest = set(wanted)
        with self._lock:
            self._begin(layer, rest)
        try:
            while rest:
                expert, arrays = self._next([each for each in wanted if each in rest])
                rest.remove(expert)
                yield expert[1], arrays
        finally:
            rest.clear()

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Starts to load experts that a later layer may ask for, the most probable first.

        Loads that have not started when a layer takes its experts are cancelled. No expert of the
        layer that is being computed leaves for a prediction, and no expert of the same prediction.

        Args:
            layer: The later MoE layer.
            experts: Its experts in the order of their loads; those for which there is no room are
                left out.
        """
        predicted = [(layer, expert) for expert in dict.fromkeys(experts)]
        with self._lock:
            self._predicted[layer] = {expert for _, expert in predicted}
            for expert in predicted:
                if not self._start(expert, kept={*predicted, *self._of(self._layer)}):
                    return

    def close(self) -> None:
        """Ends the threads, after the loads that they have started."""
        self._pool.shutdown(cancel_futures=True)

    def _of(self, layer: int) -> set[ExpertId]:
        return {expert for expert in self._held if expert[0] == layer}

    def _begin(self, layer: int, wanted: set[ExpertId]) -> None:
        """Notes what a layer asks for, and ends loads that nobody asks for and that wait."""
        self._layer, self._wanted = layer, wanted
        predicted = self._predicted.pop(layer, set())
        self._count(
            wanted=len(wanted),
            hits=len(wanted & self._held.keys()),
            predicted=len(predicted),
            right=len(predicted & {expert for _, expert in wanted}),
        )
        for expert in self._loading.keys() - wanted:
            load = self._loading[expert]
            if load.cancel() or (load.done() and load.exception()):
                del self._loading[expert]

    def _next(self, missing: Sequence[ExpertId]) -> tuple[ExpertId, DeviceArrays]:
        """Returns a missing expert that has come to the device; waits for one.

        Raises:
            ConfigError: If an expert cannot be read.
        """
        while True:
            with self._lock:
                for expert in missing:
                    self._start(expert, kept=self._wanted)
                for expert in missing:
                    if expert in self._held:
                        self._touch(expert)
                        return expert, self._held[expert]
                # Without room for any of them, a load for another layer ends first.
                loads = [expert for expert in missing if expert in self._loading]
                first = (loads or list(self._loading))[0]
                load = self._loading[first]
            start = time.perf_counter()
            wait([load])
            self._count(stall_seconds=time.perf_counter() - start)
            if error := load.exception():
                with self._lock:
                    del self._loading[first]
                if first in missing:
                    raise error

    def _start(self, expert: ExpertId, kept: set[ExpertId]) -> bool:
        """Starts a load if the expert is absent; returns False if there is no room for it."""
        if expert in self._held or expert in self._loading:
            return True
        while self.nbytes + self._store.nbytes(expert) > self._budget:
            free = sorted(self._held.keys() - kept)
            if not free:
                return False
            leaving = self._policy.leaves(free, Clock(self._layer, self._used))
            del self._held[leaving], self._used[leaving]
        self._loading[expert] = Future()  # takes its room
        load = self._pool.submit(self._load, expert)
        if expert in self._loading:
            self._loading[expert] = load
        return True

    def _load(self, expert: ExpertId) -> None:
        """Copies an expert to the device; an error leaves it among the loads, for its taker."""
        arrays = jax.block_until_ready(self._put(self._store.read(expert)))
        with self._lock:
            self._held[expert] = arrays
            self._touch(expert)
            self._count(loads=1, bytes_moved=self._store.nbytes(expert))
            del self._loading[expert]

    def _touch(self, expert: ExpertId) -> None:
        self._time += 1
        self._used[expert] = self._time

    def _count(self, **more: float) -> None:
        with self._lock:
            old = dataclasses.asdict(self._counts)
            self._counts = OffloadCounts(**{name: old[name] + more.get(name, 0) for name in old})


class _AtOnce(Executor):
    """Runs a call in the thread that submits it."""

    def submit(self, call: Callable[..., _Value], /, *args: Any, **names: Any) -> Future[_Value]:
        done: Future[_Value] = Future()
        try:
            done.set_result(call(*args, **names))
        except Exception as error:
            done.set_exception(error)
        return done


def _check_budget(store: Store, budget: int) -> None:
    """Rejects a budget that does not hold the largest expert of a store.

    Raises:
        ConfigError: If so.
    """
    each = [(layer, e) for layer, number in enumerate(store.experts) for e in range(number)]
    largest = max(each, key=store.nbytes)
    if store.nbytes(largest) > budget:
        raise ConfigError(
            f"a budget of {budget} bytes does not hold expert {largest[1]} of MoE layer "
            f"{largest[0]}: use {store.nbytes(largest)} bytes or more"
        )
