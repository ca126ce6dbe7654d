"""Candidates of this package: transports and backends of grouped products."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from moe_jax.benchmark.candidate import Call, Candidate, CannotRun
from moe_jax.benchmark.given import Problem
from moe_jax.benchmark.oracle import Values
from moe_jax.benchmark.shapes import Shape
from moe_jax.grouped import BACKENDS, using
from moe_jax.nn.feed_forward import FeedForwardConfig
from moe_jax.nn.mode import TRAIN
from moe_jax.nn.moe import ConfiguredMoE
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.routing import presets
from moe_jax.transport import implementation

# Largest number of elements of the dispatch tensor (S, E C) of the transport ``einsum``.
_EINSUM = 2**24
# Largest product of tokens and experts for which dense grouped products are worth their time.
_DENSE = 2**12
_ONLY_ON = {"megablox": "tpu", "tokamax": "gpu"}


@dataclasses.dataclass(frozen=True)
class _Way:
    """How a layer computes.

    Attributes:
        transport: Transport of the tokens.
        backend: Backend of grouped products, or "".
        capacity: Capacity factor; ``None`` drops nothing.
    """

    transport: str
    backend: str = ""
    capacity: float | None = None

    @property
    def name(self) -> str:
        """Name of the candidate."""
        parts = ["moe_jax", self.transport, self.backend]
        return "/".join(part for part in parts if part) + (
            "" if self.capacity is None else f"/capacity_{self.capacity:g}"
        )


def candidates() -> list[Candidate]:
    """Returns every transport, and every backend of the transport ``ragged``, for both parts."""
    ways = [
        *(_Way("ragged", name) for name in BACKENDS),
        *(_Way(name, "", capacity) for name in ("gather", "einsum") for capacity in (None, 1.0)),
    ]
    return [
        Candidate(way.name, part, functools.partial(_open, part, way), way.transport, way.backend)
        for part in ("experts", "layer")
        for way in ways
    ]


def _open(part: str, way: _Way, problem: Problem, backward: bool) -> Call:
    _require(part, way, problem)
    layer = _layer(problem, way)
    x, dy = (jnp.asarray(value, problem.dtype)[None] for value in (problem.x, problem.dy))
    capacity = layer.config.router.slots(problem.shape.tokens, problem.shape.experts, train=True)
    plan = layer.config.router(problem.logits[None], capacity=capacity)

    def forward(layer: ConfiguredMoE, x: Array, plan: Any) -> Array:
        if part == "layer":
            return layer(x, jnp.ones(x.shape[:2], bool), mode=TRAIN)[0]
        return implementation(layer.config).dispatch(layer.experts, x, plan)

    def loss(layer: ConfiguredMoE, x: Array, plan: Any) -> tuple[Array, Array]:
        y = forward(layer, x, plan)
        return jnp.vdot(y.astype(jnp.float32), dy.astype(jnp.float32)), y

    step: Any = jax.grad(loss, (0, 1), has_aux=True) if backward else forward
    with using(way.backend) if way.backend else contextlib.nullcontext():
        compiled = jax.jit(step).lower(layer, x, plan).compile()
    memory = compiled.memory_analysis()
    drops = part == "layer" and way.capacity is not None
    return Call(
        lambda: jax.block_until_ready(compiled(layer, x, plan)),
        (lambda _: {}) if drops else functools.partial(_values, part, backward),
        None if memory is None else int(memory.temp_size_in_bytes),
    )


def require_backend(backend: str, shape: Shape) -> None:
    """Raises ``CannotRun`` with the reason if a backend cannot compute a shape here."""
    platform = jax.default_backend()
    needed = _ONLY_ON.get(backend, platform)
    if needed != platform:
        raise CannotRun(f"needs a {needed}")
    if backend == "tokamax" and importlib.util.find_spec("tokamax") is None:
        raise CannotRun("tokamax is not installed")
    if backend == "ragged_dot" and platform != "tpu" and shape.experts * shape.tokens > _DENSE:
        raise CannotRun("ragged_dot computes every expert for every row here")


def _require(part: str, way: _Way, problem: Problem) -> None:
    shape = problem.shape
    require_backend(way.backend, shape)
    slots = shape.tokens if way.capacity is None else shape.tokens * shape.k // shape.experts
    if way.transport == "einsum" and shape.tokens * shape.experts * slots > _EINSUM:
        raise CannotRun("einsum needs too large a dispatch tensor for one group")
    if part == "experts" and way.capacity is not None and problem.regime != "balanced":
        raise CannotRun("drops tokens of this regime")


def _layer(problem: Problem, way: _Way) -> ConfiguredMoE:
    """Returns the layer with the weights of a problem."""
    shape = problem.shape
    config = MoEConfig(
        num_experts=shape.experts,
        router=presets.mixtral(shape.k, 0.0, way.capacity),
        expert_dim=shape.hidden,
        group_size=shape.tokens,
        transport=way.transport,
    )
    expert = FeedForwardConfig(shape.width, shape.hidden, shape.activation, shape.gated)
    layer: Any = ConfiguredMoE(config, expert, jax.random.key(0))
    for name, value in problem.matrices.items():
        parameter = getattr(layer.experts, name)
        setattr(layer.experts, name, parameter.replace(jnp.asarray(value, problem.dtype)))
    (name,) = layer.router.names
    weights = jnp.asarray(problem.router, jnp.float32)
    setattr(layer.router, name, getattr(layer.router, name).replace(weights))
    return layer


def _values(part: str, backward: bool, result: Any) -> Values:
    if not backward:
        return {"y": _float(result)[0]}
    (layer, x), y = result
    names = [name for name in ("up", "down", "gate") if hasattr(layer.experts, name)]
    gradients = {name: _float(getattr(layer.experts, name)[...]) for name in names}
    if part == "layer":
        gradients["router"] = _float(getattr(layer.router, layer.router.names[0])[...])
    return {"y": _float(y)[0], "x": _float(x)[0], **gradients}


def _float(value: Array) -> np.ndarray:
    return np.asarray(value.astype(jnp.float32))
