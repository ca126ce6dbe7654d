"""Layouts by hand, and that each undoes itself."""

import numpy as np
import pytest

from moe_jax.interop.huggingface.entries import (
    Columns,
    EitherWay,
    ExpertMatrices,
    ExpertRows,
    HeadRows,
    Matrix,
    RowRange,
    Same,
    Whole,
    Without,
)


def numbers(*shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize(
    ("layout", "theirs", "ours"),
    [
        (Same(), (6,), [(2, 3)]),
        (Matrix(), (6, 4), [(4, 2, 3)]),
        (Matrix(2), (4, 6), [(2, 3, 4)]),
        (RowRange(), (10, 4), [(4, 2, 3), (4, 4)]),
        (HeadRows(), (10, 4), [(4, 2, 3), (4, 2, 2)]),
        (Columns(), (3, 4, 6), [(3, 4, 3), (3, 4, 3)]),
        (Columns(in_turns=True), (3, 4, 6), [(3, 4, 3), (3, 4, 3)]),
        (Without(Columns(in_turns=True)), (3, 6), [(3, 1, 3), (3, 1, 3)]),
        (Without(Whole()), (3, 6), [(3, 1, 6)]),
        (ExpertRows(), (6, 4), [(2, 3, 4)]),
        (ExpertRows(transposed=True), (6, 4), [(2, 4, 3)]),
        (ExpertMatrices(), (3, 6, 4), [(3, 4, 2), (3, 4, 4)]),
        (EitherWay(), (3, 6, 4), [(3, 4, 3), (3, 4, 3)]),
        (Whole(), (2, 3), [(2, 3)]),
    ],
)
def test_there_and_back(layout, theirs, ours):
    tensor = numbers(*theirs)
    arrays = layout.to_ours(tensor, ours)
    assert [array.shape for array in arrays] == ours
    np.testing.assert_array_equal(layout.to_theirs(arrays), tensor)


def test_experts_are_read_with_their_axes_in_either_order():
    tensor, shapes = numbers(2, 6, 4), [(2, 4, 3), (2, 4, 3)]
    for one, other in zip(
        EitherWay().to_ours(tensor, shapes),
        EitherWay().to_ours(tensor.swapaxes(1, 2), shapes),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_by_hand():
    # Two heads of two features from one input: rows are head 0's features, then head 1's.
    (query,) = Matrix().to_ours(np.array([[1.0], [2.0], [3.0], [4.0]]), [(1, 2, 2)])
    np.testing.assert_array_equal(query, [[[1, 2], [3, 4]]])
    # Each head's rows: a key feature, then two of its value.
    key, value = HeadRows().to_ours(numbers(6, 1), [(1, 2, 1), (1, 2, 2)])
    np.testing.assert_array_equal(key, [[[0], [3]]])
    np.testing.assert_array_equal(value, [[[1, 2], [4, 5]]])
    gate, up = Columns(in_turns=True).to_ours(numbers(4), [(2,), (2,)])
    np.testing.assert_array_equal([gate, up], [[0, 2], [1, 3]])
