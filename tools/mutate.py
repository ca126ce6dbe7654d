"""Changes the code one place at a time and writes which changes no test notices.

``python tools/mutate.py --sample 120 --seed 0`` draws mutations of the routers, the transports, the
MoE layer and the training step, applies each to a temporary copy of the package, runs the tests of
the changed file there and appends a line to ``tools/mutations.tsv``: the file and line, the
mutation, and ``killed`` or ``survived``. A mutation that has a line already is left out, so that a
run that was stopped goes on. The last column is written by hand: why a survivor changes nothing.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "tools" / "mutations.tsv"
TESTS = {
    "moe_jax/routing": ("tests/routing",),
    "moe_jax/transport": ("tests/transport", "tests/nn/test_moe.py"),
    "moe_jax/nn/moe.py": ("tests/nn/test_moe.py", "tests/nn/test_features.py"),
    "moe_jax/nn/router.py": ("tests/nn/test_moe.py", "tests/training/test_router_state.py"),
    "moe_jax/training/step.py": ("tests/training/test_step.py",),
    "moe_jax/training/loss.py": ("tests/training/test_loss.py", "tests/training/test_step.py"),
}
_OPERATORS: dict[type, type] = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult},
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd},
}
_NAMES = {
    **{"argmax": "argmin", "argmin": "argmax", "max": "min", "min": "max"},
    **{"maximum": "minimum", "minimum": "maximum", "sum": "mean", "mean": "sum"},
    **{"any": "all", "all": "any", "clean": "scores", "log_clean": "log_scores"},
}
Change = tuple[str, Callable[[ast.AST], None]]


def set_(name: str, value: object) -> Callable[[ast.AST], None]:
    """Returns a change that sets one field of a node."""
    return lambda node: setattr(node, name, value)


def changes(node: ast.AST) -> Iterator[Change]:
    """Yields what can be changed in one node, in words and as a function."""
    if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in _OPERATORS:
        other = _OPERATORS[type(node.op)]
        yield f"{type(node.op).__name__} -> {other.__name__}", set_("op", other())
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
        yield "left & right -> right", lambda node: _become(node, node.right)
        yield "left & right -> left", lambda node: _become(node, node.left)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _OPERATORS:
        other = _OPERATORS[type(node.ops[0])]
        yield f"{type(node.ops[0]).__name__} -> {other.__name__}", set_("ops", [other()])
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield f"{node.value} -> {not node.value}", set_("value", not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        for value in (node.value + 1, node.value - 1):
            yield f"{node.value} -> {value}", set_("value", value)
    if isinstance(node, ast.Attribute) and node.attr in _NAMES:
        yield f".{node.attr} -> .{_NAMES[node.attr]}", set_("attr", _NAMES[node.attr])
    if isinstance(node, ast.IfExp):
        yield "always the first branch", lambda node: _become(node, node.body)
        yield "always the second branch", lambda node: _become(node, node.orelse)


def _become(node: ast.AST, part: ast.expr) -> None:
    """Makes a node pass on one of its parts alone."""
    whole = ast.IfExp(test=ast.Constant(True), body=part, orelse=part)
    node.__class__ = ast.IfExp
    node.__dict__.update(whole.__dict__)


def mutations(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yields the place and words, the number of the node and of its change, for every mutation."""
    for index, node in enumerate(ast.walk(ast.parse(path.read_text()))):
        for number, (words, _) in enumerate(changes(node)):
            yield f"{node.lineno}:{node.col_offset}\t{words}", index, number


def mutated(path: Path, index: int, number: int) -> str:
    """Returns the source of a file with one mutation."""
    tree = ast.parse(path.read_text())
    node = list(ast.walk(tree))[index]
    list(changes(node))[number][1](node)
    return ast.unparse(ast.fix_missing_locations(tree))


def files() -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Yields the files to change and the tests of each."""
    for name, tests in TESTS.items():
        place = ROOT / name
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            yield path, tests


def killed(path: Path, source: str, tests: tuple[str, ...], limit: float) -> bool:
    """Returns whether a test fails, or runs out of time, with ``source`` in place of a file."""
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder)
        for name in ("moe_jax", "configs", "experiments", "tests", "pyproject.toml", "docs"):
            whole = ROOT / name
            if whole.is_dir():
                shutil.copytree(whole, copied / name)
            else:
                shutil.copy(whole, copied / name)
        (copied / path.relative_to(ROOT)).write_text(source)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        environment = {**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return True
        return done.returncode != 0


def main() -> None:
    """Draws mutations and tries those that have no line in the result yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=120, help="mutations to draw")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for the tests of one")
    given = parser.parse_args()
    found = [(path, tests, *mutation) for path, tests in files() for mutation in mutations(path)]
    drawn = random.Random(given.seed).sample(found, min(given.sample, len(found)))
    tried = RESULT.read_text().splitlines() if RESULT.exists() else []
    known = {"\t".join(line.split("\t")[:3]) for line in tried}
    for path, tests, words, index, number in drawn:
        title = f"{path.relative_to(ROOT)}\t{words}"
        if title in known:
            continue
        source = mutated(path, index, number)
        outcome = "killed" if killed(path, source, tests, given.limit) else "survived"
        with RESULT.open("a") as file:
            file.write(f"{title}\t{outcome}\t\n")
        print(title, outcome, flush=True)


if __name__ == "__main__":
    main()
