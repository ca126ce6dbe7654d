"""Which files ``make test`` and ``make exhaustive`` leave out without an import."""

import ast
import functools
import math
import time
import types
from pathlib import Path

import pytest

from tests import conftest
from tests.conftest import (
    by_commit,
    left_to_exhaustive,
    pytest_ignore_collect,
    pytest_runtest_setup,
)

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


def names_of(file):
    """Names of the tests of a file; a class or a decorator may hide none of them."""
    tree = ast.parse(file.read_text())
    return {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}


def test_every_line_names_a_test_that_exists():
    known = functools.cache(names_of)
    missing = []
    for line in left_to_exhaustive():
        path, *names = line.name.split("[")[0].split("::")
        there = (ROOT / path).exists() and {*names} <= (known(ROOT / path) if names else set())
        missing += [] if there else [line.name]
    assert missing == []


def test_a_limited_run_skips_the_tests_that_would_start_later(monkeypatch):
    def item(seconds):
        return types.SimpleNamespace(config=types.SimpleNamespace(getoption=lambda _: seconds))

    monkeypatch.setattr(conftest, "BEGAN", time.monotonic() - 100)
    pytest_runtest_setup(item(math.inf))
    pytest_runtest_setup(item(200.0))
    with pytest.raises(pytest.skip.Exception, match="not run: the 99 s of this run are over"):
        pytest_runtest_setup(item(99.0))


def test_each_commit_orders_files_anew_and_keeps_the_order_in_a_file():
    items = [
        types.SimpleNamespace(nodeid=f"tests/test_{f}.py::test_{t}") for f in "abcd" for t in "xy"
    ]

    def order(commit):
        return [item.nodeid for item in sorted(items, key=by_commit(commit))]

    orders = {tuple(order(commit)) for commit in ("e61fd40", "4a0844d", "b59d2c5", "2cb60e3")}
    assert len(orders) > 1
    for names in orders:
        assert all(a[:-1] == b[:-1] for a, b in zip(names[::2], names[1::2], strict=True))
        assert all(a.endswith("x") for a in names[::2])
