"""Candidates of this package: transports and backends of grouped products."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from moe_jax.benchmark.candidate import Call, Candidate, Skipped
from moe_jax.benchmark.given import Problem
from moe_jax.benchmark.oracle import Values
from moe_jax.grouped import BACKENDS, using
from moe_jax.nn.feed_forward import FeedForwardConfig
from moe_jax.nn.mode import TRAIN
from moe_jax.nn.moe import ConfiguredMoE
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.routing import presets
from moe_jax.transport import implementation

# Largest number of elements of the dispatch tensor (S, E C) of the transport ``einsum``.
_EINSUM = 2**24
_ONLY_ON = {"megablox": "tpu", "tokamax": "gpu"}


def candidates() -> list[Candidate]:
    """Returns every transport, and every backend of the transport ``ragged``, for both parts."""
    ways = [("ragged", name) for name in BACKENDS] + [("gather", ""), ("einsum", "")]
    return [
        Candidate(
            f"moe_jax/{transport}{'/' if backend else ''}{backend}",
            part,
            functools.partial(_open, part, transport, backend),
            transport,
            backend,
        )
        for part in ("experts", "layer")
        for transport, backend in ways
    ]


def _open(part: str, transport: str, backend: str, problem: Problem, backward: bool) -> Call:
    _require(transport, backend, problem)
    layer = _layer(problem, transport)
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
    with using(backend) if backend else contextlib.nullcontext():
        compiled = jax.jit(step).lower(layer, x, plan).compile()
    memory = compiled.memory_analysis()
    return Call(
        lambda: jax.block_until_ready(compiled(layer, x, plan)),
        functools.partial(_values, part, backward),
        None if memory is None else int(memory.temp_size_in_bytes),
    )


def _require(transport: str, backend: str, problem: Problem) -> None:
    platform = jax.default_backend()
    needed = _ONLY_ON.get(backend, platform)
    if needed != platform:
        raise Skipped(f"needs a {needed}")
    if backend == "tokamax" and importlib.util.find_spec("tokamax") is None:
        raise Skipped("tokamax is not installed")
    shape = problem.shape
    if transport == "einsum" and shape.tokens**2 * shape.experts > _EINSUM:
        raise Skipped("dropless einsum needs too large a dispatch tensor")


def _layer(problem: Problem, transport: str) -> ConfiguredMoE:
    """Returns the layer with the weights of a problem."""
    shape = problem.shape
    config = MoEConfig(
        num_experts=shape.experts,
        router=presets.mixtral(k=shape.k, balance_weight=0.0),
        expert_dim=shape.hidden,
        group_size=shape.tokens,
        transport=transport,
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
