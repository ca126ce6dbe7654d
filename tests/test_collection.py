"""Which files ``make test`` and ``make exhaustive`` leave out without an import."""

import types
from pathlib import Path

import pytest

from tests.conftest import pytest_ignore_collect

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("file", "in_test", "in_exhaustive"),
    [
        ("parity/test_live.py", False, True),  # left out as a whole
        ("routing/test_properties.py", True, True),  # a part of its cases is left out
        ("parallel/test_collectives.py", True, True),  # marks cases itself, by a matrix
        ("test_arrows.py", True, False),  # nothing of it is left out
    ],
)
def test_a_file_is_left_out_if_no_test_of_it_is_selected(file, in_test, in_exhaustive):
    def read(expression):
        option = types.SimpleNamespace(markexpr=expression)
        config = types.SimpleNamespace(rootpath=ROOT, option=option)
        return not pytest_ignore_collect(ROOT / "tests" / file, config)

    expressions = ("not exhaustive", "exhaustive", "")
    assert [read(expression) for expression in expressions] == [in_test, in_exhaustive, True]
