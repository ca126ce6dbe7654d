"""Grouped products on every backend, against products expert by expert in float64."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax import grouped
from moe_jax.errors import ConfigError
from moe_jax.grouped import loop, megablox, product

M, N = 6, 5
# Rows of each of four experts, and the number of all rows: some experts are empty, one has all, no
# expert has any, rows are left over, one row each, and more rows than a block has.
CASES = {
    "some empty": ([10, 0, 30, 5], 64),
    "one hot": ([0, 40, 0, 0], 40),
    "none": ([0, 0, 0, 0], 16),
    "one row": ([0, 1, 0, 0], 1),
    "one each": ([1, 1, 1, 1], 5),
    "blocks and rests": ([300, 100, 77, 500], 1000),
}
# The kernel for TPUs runs by XLA here, as a program of the same steps.
INTERPRETED = grouped.Backend(
    functools.partial(megablox.product, interpret=True),
    functools.partial(megablox.outer, interpret=True),
)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setitem(product.BACKENDS, "megablox", INTERPRETED)


def made(sizes, rows, scale=1.0):
    """Rows, matrices, sizes and the gradient of the products."""
    rng = np.random.default_rng(sum(sizes))
    x = rng.normal(size=(rows, M))
    matrices = rng.normal(size=(len(sizes), M, N))
    return x, matrices, np.array(sizes, np.int32), scale * rng.normal(size=(rows, N))


def expected(x, matrices, sizes, dy):
    """Products, and gradients of rows and matrices, in float64."""
    y, dx, dm = np.zeros((len(x), N)), np.zeros_like(x), np.zeros_like(matrices)
    for expert, (start, size) in enumerate(zip(np.cumsum(sizes) - sizes, sizes, strict=True)):
        part = slice(start, start + size)
        y[part] = x[part] @ matrices[expert]
        dx[part] = dy[part] @ matrices[expert].T
        dm[expert] = x[part].T @ dy[part]
    return y, dx, dm


def narrow(case):
    """The arrays of a case in float32; sizes stay whole numbers."""
    return [jnp.asarray(x, x.dtype if x.dtype == np.int32 else "float32") for x in case]


@functools.partial(jax.jit, static_argnums=0)
def computed(backend, x, matrices, sizes, dy):
    with grouped.using(backend):
        y, pull = jax.vjp(lambda *both: grouped.grouped_product(*both, sizes), x, matrices)
        return y, *pull(dy)


def assert_close(found, wanted, bound):
    """Compares by relative norm, so that small gradients count as much as large ones."""
    for got, exact in zip(found, wanted, strict=True):
        error = np.linalg.norm(np.asarray(got, np.float64) - exact)
        assert error <= bound * max(np.linalg.norm(exact), 1e-30)


@pytest.mark.parametrize("backend", grouped.BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_products_and_both_gradients_are_those_expert_by_expert(name, backend):
    # Gradients of a real loss are near 1e-5.
    case = made(*CASES[name], scale=1e-5)
    assert_close(computed(backend, *narrow(case)), expected(*case), 1e-6)


@pytest.mark.parametrize("backend", grouped.BACKENDS)
def test_bfloat16_rows_are_summed_in_float32(backend):
    sizes, rows = CASES["blocks and rests"]
    x, matrices, sizes, dy = made(sizes, rows, scale=1e-5)
    x, matrices, dy = (jnp.asarray(each, jnp.bfloat16) for each in (x, matrices, dy))
    exact = [np.asarray(each, np.float64) for each in (x, matrices)]
    wanted = expected(*exact, np.asarray(sizes), np.asarray(dy, np.float64))
    found = computed(backend, x, matrices, jnp.asarray(sizes), dy)
    assert all(each.dtype == jnp.bfloat16 for each in found)
    # One rounding of the result: half of 2 ** -8, relative.
    assert_close(found, wanted, 2.0**-9)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=4, max_size=4), st.integers(1, 3))
def test_a_loop_over_blocks_agrees_for_any_sizes(sizes, left_over):
    rows = 80 + left_over
    case = made(sizes, rows)
    assert_close(computed("loop", *narrow(case)), expected(*case), 1e-6)


@pytest.mark.parametrize(
    ("rows", "groups", "blocks"),
    [(8192, 8, (512, 64)), (32768, 64, (512, 64)), (4096, 128, (32, 16)), (5, 4, (5, 5))],
)
def test_blocks_follow_an_even_share_of_the_rows(rows, groups, blocks):
    assert loop.block_sizes(rows, groups) == blocks


def test_a_value_by_row_is_that_of_the_rows_expert():
    values = jnp.array([[1.0], [2.0], [3.0]])
    found = grouped.by_row(values, jnp.array([2, 0, 1]), 4)
    # The last row has no expert.
    assert found[:3, 0].tolist() == [1.0, 1.0, 3.0]


def test_the_devices_of_the_mesh_choose_the_backend():
    assert grouped.backend_of("tpu") == "megablox"
    assert grouped.backend_of("cpu") == "loop"
    assert grouped.backend_of("gpu") == "tokamax"
    assert grouped.backend_of("metal") == "blocks"
    # XLA partitions loops and blocks, but no kernel.
    assert grouped.backend_of("tpu", devices=2) == "blocks"
    assert grouped.backend_of("cpu", devices=2) == "loop"


def test_a_program_for_a_tpu_has_the_kernel(monkeypatch):
    monkeypatch.undo()
    x, matrices, sizes, _ = made(*CASES["some empty"])
    shapes = [jax.ShapeDtypeStruct(each.shape, jnp.bfloat16) for each in (x, matrices)]
    shapes.append(jax.ShapeDtypeStruct(sizes.shape, jnp.int32))
    with grouped.using("megablox"):
        traced = jax.jit(grouped.grouped_product).trace(*shapes)
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.skipif(importlib.util.find_spec("tokamax"), reason="tokamax is installed")
def test_blocks_that_replace_the_kernels_of_a_gpu_are_named():
    # In the tests above, blocks stand for tokamax too: its kernels need a GPU.
    with pytest.warns(UserWarning, match="blocks replace the kernels of tokamax.*ModuleNotFound"):
        computed("tokamax", *narrow(made([1, 2, 0, 0], 7)))


def test_an_unknown_backend_is_named():
    message = "no backend 'cudnn'.*use blocks, loop, megablox, ragged_dot, tokamax"
    with pytest.raises(ConfigError, match=message), grouped.using("cudnn"):
        pass
