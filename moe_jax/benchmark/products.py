"""Grouped products alone, by every backend and by kernels for Hopper at several sizes of blocks.

The three products of a layer's up projection are measured: ``rows`` of tokens times matrices,
``transposed`` for the gradient of the rows, and ``outer`` for the gradient of the matrices.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from moe_jax.benchmark.candidate import Call, CannotRun
from moe_jax.benchmark.given import choices_of
from moe_jax.benchmark.layers import require_backend
from moe_jax.benchmark.measure import Measurement, Trial, completed
from moe_jax.benchmark.oracle import Values
from moe_jax.benchmark.shapes import Shape
from moe_jax.grouped import BACKENDS

PRODUCTS = "products"
KINDS = ("rows", "transposed", "outer")
# Rows, columns, depth and stages of a block. JAX and tokamax have these kernels for Hopper.
_PALLAS = ((128, 128, 64, 4), (128, 192, 64, 4), (64, 256, 64, 4))
_TOKAMAX = ((64, 64, 128, 2), (128, 64, 128, 4), (128, 128, 64, 4), (128, 128, 128, 3))
# The regime leaves boundaries of experts inside blocks, and experts of unequal load.
_REGIME = "uniform"
Product = Callable[[Array, Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Factors:
    """The arrays of one shape.

    Attributes:
        x: Rows ``(R, M)``, sorted by expert.
        dy: Gradients ``(R, F)`` of their products.
        matrices: Matrices ``(E, M, F)``.
        sizes: Number ``(E,)`` of rows of each expert.
    """

    x: Array
    dy: Array
    matrices: Array
    sizes: np.ndarray

    def arguments(self, kind: str) -> tuple[Array, Array, Array]:
        """Returns the two factors of a product and the sizes."""
        a = self.dy if kind == "transposed" else self.x
        return a, self.dy if kind == "outer" else self.matrices, jnp.asarray(self.sizes)

    def compared(self) -> dict[str, slice]:
        """Returns the rows of the largest and the last expert, which are compared."""
        ends = np.cumsum(self.sizes)
        experts = {int(np.argmax(self.sizes)), len(self.sizes) - 1}
        return {str(e): slice(int(ends[e] - self.sizes[e]), int(ends[e])) for e in experts}


def measure_products(
    shape: Shape, starts: tuple[str, ...], dtype: str, rounds: int
) -> list[Measurement]:
    """Returns a row for each product and each candidate.

    Args:
        shape: Shape of a layer.
        starts: Starts of names of candidates; empty for all of them.
        dtype: Type of the factors.
        rounds: Number of rounds after the warm-up.
    """
    chosen = {name: one for name, one in candidates().items() if name.startswith(starts or ("",))}
    if not chosen:
        return []
    rows, found = _rows(shape, dtype), []
    flops = 2.0 * rows.x.shape[0] * shape.width * shape.hidden
    for kind in KINDS:
        entries = [
            Trial(
                Measurement(shape.name, _REGIME, PRODUCTS, name, "", "", kind, dtype),
                functools.partial(_open, shape, rows, kind, candidate),
            )
            for name, candidate in chosen.items()
        ]
        found += completed(entries, _oracle(rows, kind), flops, rounds)
    return found


def candidates() -> dict[str, Callable[[str, Shape], Product]]:
    """Returns functions of a kind and a shape that return the product, by name of the candidate."""
    return {
        **{f"moe_jax/{name}": functools.partial(_backend, name) for name in BACKENDS},
        **{f"pallas/{_text(sizes)}": functools.partial(_pallas, *sizes) for sizes in _PALLAS},
        **{f"tokamax/{_text(sizes)}": functools.partial(_tokamax, *sizes) for sizes in _TOKAMAX},
    }


def _text(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def _backend(name: str, kind: str, shape: Shape) -> Product:
    require_backend(name, shape)
    backend = BACKENDS[name]
    if kind == "outer":
        return backend.outer
    return functools.partial(backend.product, transposed=kind == "transposed")


def _hopper(name: str) -> None:
    """Rejects devices without the instructions of Hopper."""
    device = jax.devices()[0]
    if device.platform != "gpu" or str(getattr(device, "compute_capability", "")) != "9.0":
        raise CannotRun(f"{name} needs a Hopper GPU")


def _pallas(m: int, n: int, k: int, stages: int, kind: str, shape: Shape) -> Product:
    _hopper("the kernel of jax.experimental.pallas.ops.gpu")
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu, transposed_ragged_dot_mgpu

    blocks: dict[str, Any] = {"block_m": m, "block_n": n, "block_k": k}
    blocks |= {"max_concurrent_steps": stages, "grid_block_n": 1}
    if kind == "outer":
        product = transposed_ragged_dot_mgpu.transposed_ragged_dot
    else:
        product = ragged_dot_mgpu.ragged_dot
        blocks["transpose_rhs"] = kind == "transposed"
    return lambda a, b, sizes: product(a, b, group_sizes=sizes, **blocks)


def _tokamax(m: int, n: int, k: int, stages: int, kind: str, shape: Shape) -> Product:
    _hopper("the kernel of tokamax")
    try:
        # The settings of blocks are no part of the public functions.
        from tokamax._src.ops.ragged_dot import pallas_mosaic_gpu as kernels
    except ImportError as error:
        raise CannotRun(f"tokamax is not installed: {error}") from error
    settings = kernels.Config(
        block_m=m, block_n=n, block_k=k, num_stages=stages, split_k=1, grid_tile_width=8
    )
    product = kernels.PallasMosaicGpuRaggedDot(config=settings)
    dimensions = jax.lax.RaggedDotDimensionNumbers(
        (([0], [0]) if kind == "outer" else ([1], [1]), ([], [])),
        [0],
        [] if kind == "outer" else [0],
    )
    return lambda a, b, sizes: product(
        a,
        b.swapaxes(1, 2) if kind == "transposed" else b,
        group_sizes=sizes,
        ragged_dot_dimension_numbers=dimensions,
        preferred_element_type=a.dtype,
    )


def _rows(shape: Shape, dtype: str) -> Factors:
    random = np.random.default_rng(0)
    choices = choices_of(_REGIME, shape.tokens, shape.experts, shape.k, 1, random)
    sizes = np.bincount(choices.reshape(-1), minlength=shape.experts).astype(np.int32)
    keys = jax.random.split(jax.random.key(0), 3)
    m, f, e = shape.width, shape.hidden, shape.experts
    x, dy, matrices = (
        jax.random.normal(key, size, jnp.float32).astype(dtype)
        for key, size in zip(keys, ((choices.size, m), (choices.size, f), (e, m, f)), strict=True)
    )
    return Factors(x, dy, matrices * m**-0.5, sizes)


def _open(
    shape: Shape, rows: Factors, kind: str, candidate: Callable[[str, Shape], Product]
) -> Call:
    arguments = rows.arguments(kind)
    compiled = jax.jit(candidate(kind, shape)).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    return Call(
        lambda: jax.block_until_ready(compiled(*arguments)),
        functools.partial(_values, rows, kind),
        None if memory is None else int(memory.temp_size_in_bytes),
    )


def _values(rows: Factors, kind: str, result: Array) -> Values:
    parts = {
        name: result[int(name)] if kind == "outer" else result[part]
        for name, part in rows.compared().items()
    }
    return {name: np.asarray(part.astype(jnp.float32)) for name, part in parts.items()}


def _oracle(rows: Factors, kind: str) -> Mapping[str, np.ndarray]:
    """Returns the product of the compared experts in float32."""

    def of(name: str, part: slice) -> Array:
        x, dy, matrix = (
            a.astype(jnp.float32) for a in (rows.x[part], rows.dy[part], rows.matrices[int(name)])
        )
        a, b = {"rows": (x, matrix), "transposed": (dy, matrix.T), "outer": (x.T, dy)}[kind]
        return jnp.matmul(a, b, precision="highest")

    return {name: np.asarray(of(name, part)) for name, part in rows.compared().items()}
