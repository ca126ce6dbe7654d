"""Numbers of the endpoint for Prometheus."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from moe_jax.serving.bridge import Bridge
from moe_jax.serving.stream import StreamState

CONTENT_TYPE = CONTENT_TYPE_LATEST
_DRAFTS = {
    "proposed": ("proposed_drafts", "Drafted tokens that the model has checked."),
    "accepted": ("accepted_drafts", "Drafted tokens that the model has sampled too."),
    "tokens_per_step": ("tokens_per_step", "Mean tokens that a request gets from a step."),
}
# By the field of ``OffloadCounts``: the name of the metric and its meaning.
_OFFLOADED = {
    "wanted": ("wanted_experts", "Experts that layers asked for."),
    "hits": ("expert_hits", "Experts among them that the device held."),
    "hit_rate": ("expert_hit_rate", "Hits over wanted experts."),
    "loads": ("expert_loads", "Experts that were copied to the device."),
    "bytes_moved": ("expert_bytes_moved", "Bytes of these experts."),
    "stall_seconds": ("expert_stall_seconds", "Time in which layers waited for experts."),
    "predicted": ("predicted_experts", "Experts that were predicted for the next layer."),
    "right": ("right_predictions", "Experts among them that the layer asked for."),
    "accuracy": ("expert_prediction_accuracy", "Right over predicted experts."),
}
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counters, gauges and histograms of one endpoint."""

    def __init__(self, bridge: Bridge):
        self._registry = registry = CollectorRegistry()
        self._responses = Counter(
            "moe_jax_responses", "Responses by status.", ["path", "status"], registry=registry
        )
        self._prompts = Counter(
            "moe_jax_prompt_tokens", "Tokens of accepted prompts.", registry=registry
        )
        self._sampled = Counter("moe_jax_sampled_tokens", "Sampled tokens.", registry=registry)
        self._ends = Counter(
            "moe_jax_answers", "Answers by the reason for their end.", ["reason"], registry=registry
        )
        self._first = Histogram(
            "moe_jax_first_token_seconds",
            "Time from a request to its first token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._next = Histogram(
            "moe_jax_next_token_seconds",
            "Time from a token of an answer to the next one.",
            buckets=_SECONDS,
            registry=registry,
        )
        for name in ("waiting", "running"):
            about = f"Number of {name} requests."
            gauge = Gauge(f"moe_jax_{name}_requests", about, registry=registry)
            gauge.set_function(functools.partial(getattr, bridge, name))
        for attribute, (name, about) in _DRAFTS.items() if bridge.drafts is not None else ():
            gauge = Gauge(f"moe_jax_{name}", about, registry=registry)
            gauge.set_function(functools.partial(getattr, bridge.drafts, attribute))
        if bridge.stream is not None:
            registry.register(_AlarmGauges(bridge))
        for field, (name, about) in _OFFLOADED.items() if bridge.offloaded is not None else ():
            gauge = Gauge(f"moe_jax_{name}", about, registry=registry)
            gauge.set_function(functools.partial(_offloaded, bridge, field))

    def text(self) -> bytes:
        """Returns all numbers in the text format of Prometheus."""
        return generate_latest(self._registry)

    def respond(self, path: str, status: int) -> None:
        """Counts a response."""
        self._responses.labels(path, str(status)).inc()

    def begin(self, prompt: int) -> Stopwatch:
        """Counts the tokens of an accepted prompt, and returns the watch of its answer."""
        self._prompts.inc(prompt)
        return Stopwatch(self)

    def sampled(self, seconds: float, *, first: bool) -> None:
        """Counts a token that came after so many seconds."""
        self._sampled.inc()
        (self._first if first else self._next).observe(seconds)

    def ended(self, reason: str) -> None:
        """Counts an answer."""
        self._ends.labels(reason).inc()


class _AlarmGauges(Collector):
    """Gauges of the alarms, whose labels are those of the last judged window."""

    def __init__(self, bridge: Bridge):
        self._bridge = bridge

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yields the numbers of active conditions, and the distances of the drift."""
        stream = self._bridge.stream or StreamState()
        active = GaugeMetricFamily(
            "moe_jax_active_alarms", "Active conditions of an alarm.", labels=["alarm"]
        )
        for name in stream.names:
            active.add_metric([name], len(stream.alarms.get(name, {})))
        yield active
        if stream.drift is not None:
            drift = GaugeMetricFamily(
                "moe_jax_drift_distance",
                "Distance of the last window from the reference: token ids, and the experts of "
                "the same token ids in the layer where they are farthest.",
                labels=["of"],
            )
            drift.add_metric(["data"], stream.drift["tokens"])
            layers = [layer["same_tokens"] or 0.0 for layer in stream.drift["layers"]]
            drift.add_metric(["routing"], max(layers))
            yield drift


def _offloaded(bridge: Bridge, field: str) -> float:
    """Returns one of the counts of moved experts."""
    return float(getattr(bridge.offloaded, field))


class Stopwatch:
    """The times of the tokens of one answer."""

    def __init__(self, metrics: Metrics):
        self._metrics, self._last, self.sampled = metrics, time.monotonic(), 0

    def token(self) -> None:
        """Counts a token that has come now."""
        now = time.monotonic()
        self._metrics.sampled(now - self._last, first=not self.sampled)
        self._last, self.sampled = now, self.sampled + 1

    def end(self, reason: str | None) -> None:
        """Counts the end of the answer; ``None`` if the client has left before it."""
        self._metrics.ended(reason or "cancelled")
