"""The grouped product with its gradients, and the choice of the backend that computes it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.errors import ConfigError
from moe_jax.grouped import blocks, loop, megablox, oracle, tokamax
from moe_jax.parallel import left_to_xla, platform


@dataclasses.dataclass(frozen=True)
class Backend:
    """Two functions that compute grouped products on one kind of device.

    Attributes:
        product: Function of rows ``(R, M)`` sorted by expert, matrices ``(E, M, N)`` and sizes
            ``(E,)``, the number of rows of each expert. It returns ``(R, N)``; rows after the last
            expert are zero. With ``transposed=True`` the matrices are ``(E, N, M)``.
        outer: Function of rows ``(R, M)``, rows ``(R, N)`` and sizes ``(E,)``. It returns the sums
            ``(E, M, N)`` of the outer products of each expert's rows.
    """

    product: Callable[..., Array]
    outer: Callable[[Array, Array, Array], Array]


BACKENDS = {
    "blocks": Backend(blocks.product, blocks.outer),
    "loop": Backend(loop.product, loop.outer),
    "megablox": Backend(megablox.product, megablox.outer),
    "ragged_dot": Backend(oracle.product, oracle.outer),
    "tokamax": Backend(tokamax.product, tokamax.outer),
}
_OF_PLATFORM = {"cpu": "loop", "tpu": "megablox", "gpu": "tokamax", "cuda": "tokamax"}
_OTHERWISE = "blocks"
# Kernels of Pallas, which XLA cannot partition.
_KERNELS = ("megablox", "tokamax")
_chosen: list[str] = []


@contextlib.contextmanager
def using(name: str) -> Iterator[None]:
    """Traces all grouped products with one backend, whatever the platform.

    Args:
        name: Name of a backend in ``BACKENDS``.

    Raises:
        ConfigError: If there is no such backend.
    """
    if name not in BACKENDS:
        raise ConfigError(f"no backend {name!r} of grouped products: use {', '.join(BACKENDS)}")
    _chosen.append(name)
    try:
        yield
    finally:
        _chosen.pop()


def grouped_product(
    rows: Float[Array, "R M"],
    matrices: Float[Array, "E M N"],
    sizes: Int[Array, " E"],
    backend: str = "",
) -> Float[Array, "R N"]:
    """Returns each row times the matrix of its expert.

    The gradients of rows and matrices are grouped products too, on the same backend. An expert
    without rows gets a gradient of zeros.

    Args:
        rows: Rows ``(R, M)``, sorted by expert.
        matrices: Matrices ``(E, M, N)`` of the experts, in the type of the rows.
        sizes: Number ``(E,)`` of rows of each expert; their sum is at most ``R``.
        backend: Name of a backend; "" chooses by platform.

    Returns:
        The products ``(R, N)``, and zeros in the rows that no expert has.
    """
    return _product(backend or chosen_backend(), rows, matrices, sizes)


def chosen_backend() -> str:
    """Returns the name of the backend of ``using``, or else of the platform that is traced for."""
    return _chosen[-1] if _chosen else backend_of(platform(), left_to_xla())


def backend_of(platform: str, devices: int = 1) -> str:
    """Returns the name of the backend of a platform.

    Args:
        platform: Name of the platform.
        devices: Number of devices over which XLA may partition the product. On several devices,
            blocks replace kernels, which XLA cannot partition.
    """
    name = _OF_PLATFORM.get(platform, _OTHERWISE)
    return _OTHERWISE if name in _KERNELS and devices > 1 else name


def by_row(values: Float[Array, "E N"], sizes: Int[Array, " E"], rows: int) -> Float[Array, "R N"]:
    """Returns for each of ``R`` rows the value of its expert, such as a bias.

    Args:
        values: Values ``(E, N)``.
        sizes: Number ``(E,)`` of rows of each expert; later rows have the last expert's value.
        rows: ``R``.
    """
    owner = (jnp.cumsum(sizes) <= jnp.arange(rows)[:, None]).sum(1)
    return jnp.take(values, owner, axis=0, mode="clip", indices_are_sorted=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(name: str, rows: Array, matrices: Array, sizes: Array) -> Array:
    return BACKENDS[name].product(rows, matrices, sizes)


def _forward(name: str, rows: Array, matrices: Array, sizes: Array) -> tuple[Array, Any]:
    return _product(name, rows, matrices, sizes), (rows, matrices, sizes)


def _backward(name: str, residuals: Any, gradient: Array) -> tuple[Array, Array, None]:
    rows, matrices, sizes = residuals
    backend = BACKENDS[name]
    of_rows = backend.product(gradient, matrices, sizes, transposed=True)
    of_matrices = backend.outer(rows, gradient, sizes)
    return of_rows, of_matrices.astype(matrices.dtype), None


_product.defvjp(_forward, _backward)
