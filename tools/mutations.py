"""Mutations: changes of one expression of the code, for ``tools/mutate.py``.

A mutation flips a comparison or an operator, drops a factor, a mask, a ``not`` or a branch, adds 1
to a number, replaces a sum by a mean, a maximum by a minimum, clean scores by noisy scores or
demand by load, or uses one key for two draws. Messages, annotations and decorators are not mutated.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import itertools
import random
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = (
    *("moe_jax/routing/**/*.py", "moe_jax/transport/*.py", "moe_jax/parallel/exchange.py"),
    *("moe_jax/parallel/ragged.py", "moe_jax/grouped/*.py"),
    *("moe_jax/nn/moe.py", "moe_jax/nn/router.py"),
    *("moe_jax/training/step.py", "moe_jax/training/objective.py"),
    "moe_jax/training/loss.py",
)
_OPERATORS: dict[type, tuple[type, ...]] = {
    **{ast.Add: (ast.Sub,), ast.Sub: (ast.Add,), ast.Mult: (ast.Div,), ast.Div: (ast.Mult,)},
    **{ast.Lt: (ast.LtE,), ast.LtE: (ast.Lt,), ast.Gt: (ast.GtE,), ast.GtE: (ast.Gt,)},
    **{ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.And: (ast.Or,), ast.Or: (ast.And,)},
    **{ast.BitAnd: (ast.BitOr,), ast.BitOr: (ast.BitAnd,)},
}
_PAIRS = ("argmax argmin", "max min", "maximum minimum", "any all", "clean scores", "demand load")
_NAMES = dict(pair.split() for pair in (*_PAIRS, "log_clean log_scores", "sum mean"))
_NAMES |= {new: old for old, new in _NAMES.items()}
_PASSED_ON = ("stop_gradient", "fold_in")


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One change of one file: new text replaces the text between two offsets.

    Attributes:
        path: Path of the file, relative to the repository.
        place: Line and column of the change.
        words: Old and new expression, for the result file.
        start: Offset of the old text in bytes.
        end: End of the old text in bytes.
        new: New text.
    """

    path: str
    place: str
    words: str
    start: int
    end: int
    new: str

    @property
    def title(self) -> str:
        """First three columns of the line in the result file."""
        return f"{self.path}\t{self.place}\t{self.words}"

    def applied(self) -> str:
        """Returns the changed source."""
        source = (ROOT / self.path).read_bytes()
        return (source[: self.start] + self.new.encode() + source[self.end :]).decode()


def variants(node: ast.AST) -> Iterator[ast.AST | str]:
    """Yields the nodes, or source texts, that may replace a node."""
    match node:
        case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op):
            yield from (_with(node, op=other()) for other in _OPERATORS.get(type(op), ()))
            if isinstance(node, ast.BinOp) and isinstance(op, ast.Mult | ast.BitAnd):
                yield from (node.left, node.right)
        case ast.Compare(ops=[op]):
            yield from (_with(node, ops=[other()]) for other in _OPERATORS.get(type(op), ()))
        case ast.UnaryOp(operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield ast.Constant(value + 1)
        case ast.Attribute(attr=name) if name in _NAMES:
            yield _with(node, attr=_NAMES[name])
        case ast.Name(id=("min" | "max") as name):
            yield ast.Name(_NAMES[name])
        case ast.IfExp(body=body, orelse=orelse):
            yield from (body, orelse)
        case ast.Subscript(value=ast.Name(id="keys"), slice=ast.Constant(value=int(n))) if n:
            yield _with(node, slice=ast.Constant(0))
        case ast.Call(func=ast.Attribute(attr=name), args=[first, *_]) if name in _PASSED_ON:
            yield first
        case ast.Call(func=ast.Attribute(attr="where"), args=[_, first, second]):
            yield from (first, second)
        case ast.Call(func=ast.Attribute(attr="split"), args=[key, *count]):
            number = ast.unparse(count[0]) if count else "2"
            yield f"jax.numpy.broadcast_to({ast.unparse(key)}, ({number},))"


def _with(node: ast.AST, **fields: object) -> ast.AST:
    """Returns a copy of a node with other fields."""
    node = copy.copy(node)
    node.__dict__.update(fields)
    return node


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """Yields a node and its descendants, except messages, annotations and decorators."""
    yield node
    for name, field in ast.iter_fields(node):
        if name not in ("annotation", "returns", "decorator_list"):
            for child in field if isinstance(field, list) else [field]:
                if isinstance(child, ast.AST) and not isinstance(child, ast.Raise | ast.JoinedStr):
                    yield from _walk(child)


def mutations(path: Path) -> Iterator[Mutation]:
    """Yields every mutation of a file."""
    source = path.read_text()
    starts = [0, *itertools.accumulate(len(line.encode()) for line in source.splitlines(True))]
    name = str(path.relative_to(ROOT))
    for node in _walk(ast.parse(source)):
        for new in variants(node):
            text = new if isinstance(new, str) else ast.unparse(new)
            start = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            words = f"{ast.unparse(node)} -> {text}"
            text = f"({text})" if isinstance(node, ast.expr) else text
            yield Mutation(name, f"{node.lineno}:{node.col_offset}", words, start, end, text)


def files() -> list[Path]:
    """Returns the files to mutate."""
    sources = {path for pattern in SOURCES for path in ROOT.glob(pattern)}
    return sorted(sources - {ROOT / "moe_jax/routing/table.py"})


def drawn(seed: int) -> list[Mutation]:
    """Returns all mutations in random order, one mutation of each file in every turn."""
    shuffled = []
    for path in files():
        of_file = list(mutations(path))
        random.Random(f"{seed}/{path.relative_to(ROOT)}").shuffle(of_file)
        shuffled.append(of_file)
    turns = itertools.zip_longest(*shuffled)
    return [mutation for turn in turns for mutation in turn if mutation is not None]


def given(path: Path) -> list[Mutation]:
    """Reads mutations from a file; each line is ``file, old text, new text``.

    Raises:
        SystemExit: An old text does not occur exactly once in its file.
    """
    read = []
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            continue
        name, old, new = line.split("\t")
        source = (ROOT / name).read_text()
        if source.count(old) != 1:
            raise SystemExit(
                f"{path}: {old!r} occurs {source.count(old)} times in {name}, not once"
            )
        before = source[: source.index(old)]
        start, row = len(before.encode()), before.count("\n") + 1
        place = f"{row}:{len(before) - before.rfind(chr(10)) - 1}"
        read.append(Mutation(name, place, f"{old} -> {new}", start, start + len(old.encode()), new))
    return read
