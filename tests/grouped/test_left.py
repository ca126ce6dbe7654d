"""A product with the matrix as left factor is the plain product, with few rows and with many."""

import jax
import numpy as np
import pytest

from moe_jax.grouped import product_by_rows
from moe_jax.grouped.left import block_product


@pytest.mark.parametrize("rows", [1, 31, 32, 40])
def test_the_product_is_the_plain_one(rows):
    rng = np.random.default_rng(0)
    matrix, x = rng.standard_normal((5, 7), np.float32), rng.standard_normal((rows, 7), np.float32)
    found = jax.jit(product_by_rows)(matrix, x)
    np.testing.assert_allclose(found, x @ matrix.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [4, 40])
def test_the_matrix_stays_the_left_factor(rows):
    matrix, x = np.ones((5, 7), np.float32), np.ones((rows, 7), np.float32)
    text = jax.jit(product_by_rows).lower(matrix, x).compile().as_text()
    # A left factor of 5 rows makes a product of the shape (5, rows).
    assert f"f32[5,{rows}]" in text


@pytest.mark.parametrize("rows", [1, 64, 65])
def test_a_product_of_a_block_has_the_plain_gradients(rows):
    rng = np.random.default_rng(0)
    x, matrix = rng.standard_normal((rows, 5), np.float32), rng.standard_normal((5, 7), np.float32)
    dy = rng.standard_normal((rows, 7), np.float32)
    y, pull = jax.vjp(block_product, x, matrix)
    for found, expected in zip((y, *pull(dy)), (x @ matrix, dy @ matrix.T, x.T @ dy), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_few_rows_has_the_matrix_as_left_factor():
    x, matrix, dy = (np.ones(shape, np.float32) for shape in ((4, 5), (5, 7), (4, 7)))
    gradient = jax.jit(lambda x, matrix, dy: jax.vjp(block_product, x, matrix)[1](dy)[0])
    assert "f32[5,4]" in gradient.lower(x, matrix, dy).compile().as_text()
