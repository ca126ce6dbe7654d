"""Attention of one layer by every implementation, against whole scores in float32."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moe_jax.attend import IMPLEMENTATIONS, Options, View, attend
from moe_jax.attend.choice import Needs, choose
from moe_jax.benchmark.candidate import Call, CannotRun
from moe_jax.benchmark.measure import FORWARD_BACKWARD, Measurement, Trial, completed
from moe_jax.benchmark.oracle import Values

ATTENTION = "attention"
NAMES = tuple(f"moe_jax/{name}" for name in IMPLEMENTATIONS)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of an attention.

    Attributes:
        heads: Number ``H`` of query heads.
        kv_heads: Number ``G`` of heads of keys and values.
        length: Number ``L`` of tokens.
        depth: Width ``D`` of a head.
    """

    heads: int
    kv_heads: int
    length: int
    depth: int

    @property
    def name(self) -> str:
        """Name of the rows."""
        return f"{self.heads}x{self.length}x{self.depth}"

    def flops(self, backward: bool) -> float:
        """Returns the FLOPs of causal attention; the backward pass has 2.5 times the forward's."""
        forward = 2.0 * self.heads * self.length**2 * self.depth
        return 3.5 * forward if backward else forward


# Two documents of unequal length, so that a kernel that ignores segments is wrong.
_FIRST = 0.6
_VIEWS = {"causal": Options(), "window": Options(window=512)}
_OF_PLATFORM = {"cpu": Sizes(8, 2, 2048, 64)}
_OTHERWISE = Sizes(32, 8, 8192, 128)


def measure_attention(
    starts: tuple[str, ...],
    dtype: str,
    directions: Sequence[str],
    rounds: int,
    sizes: Sizes | None = None,
) -> list[Measurement]:
    """Returns a row for each mask, direction and implementation.

    Args:
        starts: Starts of names of candidates; empty for all of them.
        dtype: Type of queries, keys and values.
        directions: Directions to measure.
        rounds: Number of rounds after the warm-up.
        sizes: Sizes; ``None`` takes those of the platform.
    """
    sizes = sizes or _OF_PLATFORM.get(jax.default_backend(), _OTHERWISE)
    names = [n for n in IMPLEMENTATIONS if not starts or f"moe_jax/{n}".startswith(starts)]
    rows: list[Measurement] = []
    for mask, options in _VIEWS.items() if names else ():
        options = dataclasses.replace(options, scale=sizes.depth**-0.5)
        arrays, wanted = _arrays(sizes, dtype), _oracle(sizes, dtype, options)
        for direction in directions:
            backward = direction == FORWARD_BACKWARD
            entries = [
                Trial(
                    Measurement(
                        sizes.name, mask, ATTENTION, f"moe_jax/{name}", "", "", direction, dtype
                    ),
                    functools.partial(_open, arrays, name, options, backward),
                )
                for name in names
            ]
            rows += completed(entries, wanted, sizes.flops(backward), rounds)
    return rows


def _arrays(sizes: Sizes, dtype: str) -> tuple[Array, ...]:
    """Returns queries, keys, values and the gradient of the output."""
    random = np.random.default_rng(0)
    heads = (sizes.heads, sizes.kv_heads, sizes.kv_heads, sizes.heads)
    return tuple(
        jnp.asarray(random.standard_normal((1, h, sizes.length, sizes.depth), np.float32), dtype)
        for h in heads
    )


def _view(length: int) -> View:
    first = int(_FIRST * length)
    index = np.arange(length, dtype=np.int32)[None]
    second = index >= first
    return View(jnp.asarray(1 + second, jnp.int32), jnp.asarray(index - first * second))


def _open(arrays: tuple[Array, ...], name: str, options: Options, backward: bool) -> Call:
    *inputs, dy = arrays
    q, _, v = inputs
    needs = Needs(str(q.dtype), q.shape[1], v.shape[1], q.shape[3], v.shape[3])
    reason = choose(name, needs).reason
    if reason:
        raise CannotRun(reason)
    options = dataclasses.replace(options, kernel=name)  # type: ignore[arg-type]
    view = _view(q.shape[2])

    def forward(q: Array, k: Array, v: Array) -> Array:
        return attend(q, k, v, view, options)

    def loss(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        y = forward(q, k, v)
        return jnp.vdot(y.astype(jnp.float32), dy.astype(jnp.float32)), y

    step: Any = jax.grad(loss, (0, 1, 2), has_aux=True) if backward else forward
    compiled = jax.jit(step).lower(*inputs).compile()
    memory = compiled.memory_analysis()
    return Call(
        lambda: jax.block_until_ready(compiled(*inputs)),
        functools.partial(_values, backward),
        None if memory is None else int(memory.temp_size_in_bytes),
    )


def _values(backward: bool, result: Any) -> Values:
    if not backward:
        return {"y": np.asarray(result.astype(jnp.float32))}
    gradients, y = result
    found = dict(zip("yqkv", (y, *gradients), strict=True))
    return {name: np.asarray(value.astype(jnp.float32)) for name, value in found.items()}


def _oracle(sizes: Sizes, dtype: str, options: Options) -> Values:
    """Returns output and gradients from whole scores in float32, a head at a time."""
    q, k, v, dy = (np.asarray(x.astype(jnp.float32))[0] for x in _arrays(sizes, dtype))
    bias = _view(sizes.length).bias(options.window)[0, 0]
    repeats = sizes.heads // sizes.kv_heads

    def head(q: Array, k: Array, v: Array) -> Float[Array, "L D"]:
        scores = options.scale * jnp.dot(q, k.T, precision="highest") + bias
        return jnp.dot(jax.nn.softmax(scores, axis=-1), v, precision="highest")

    @jax.jit
    def one(q: Array, k: Array, v: Array, dy: Array) -> tuple[Array, ...]:
        y, pull = jax.vjp(head, q, k, v)
        return (y, *pull(dy))

    each = [one(q[h], k[h // repeats], v[h // repeats], dy[h]) for h in range(sizes.heads)]
    y, dq, dk, dv = (np.stack(parts) for parts in zip(*each, strict=True))
    dk, dv = (x.reshape(sizes.kv_heads, repeats, *x.shape[1:]).sum(1) for x in (dk, dv))
    return {name: value[None] for name, value in zip("yqkv", (y, dq, dk, dv), strict=True)}
