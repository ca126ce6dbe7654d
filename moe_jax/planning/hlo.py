"""Reads the text of a compiled program: computations, instructions, and how often each runs.

Only what the planner needs, and only of the stable parts of the format: one instruction a line,
``name = type operation(operands), attributes``, in blocks that name a computation
(https://openxla.org/xla/operation_semantics).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_INTEGER = re.compile(r"^[su]\d+\[\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        name: without ``%``.
        type: of its result, with layouts.
        operation: such as ``all-gather-start``.
        line: the whole text.
        root: whether it is the result of its computation.
    """

    name: str
    type: str
    operation: str
    line: str
    root: bool


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled module.

    Attributes:
        computations: the instructions of each, by name.
        entry: the name of the first.
    """

    computations: dict[str, list[Instruction]]
    entry: str

    @functools.cached_property
    def times(self) -> dict[str, int]:
        """How often each computation runs: loops by their trips, every branch of a condition."""
        found: collections.Counter[str] = collections.Counter({self.entry: 1})
        for name in self._callers_first():
            for instruction in self.computations[name]:
                trips = self.trips(instruction) if instruction.operation == "while" else 1
                for called in self._called(instruction):
                    found[called] += found[name] * trips
        return dict(found)

    def trips(self, loop: Instruction) -> int:
        """Returns how often the body of a ``while`` runs.

        From ``known_trip_count`` or else the one constant that its condition compares with, which
        is the length of a ``jax.lax.scan``; 1 if there is none, such as in a search.
        """
        known = _TRIPS.search(loop.line)
        if known:
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.line)
        constants = [
            int(value[1])
            for instruction in self.computations.get(condition[1] if condition else "", ())
            if instruction.operation == "constant" and _INTEGER.match(instruction.type)
            if (value := re.search(r"constant\((\d+)\)", instruction.line))
        ]
        return constants[0] if len(constants) == 1 else 1

    def _called(self, instruction: Instruction) -> list[str]:
        names = _CALLED.findall(instruction.line)
        for branches in _BRANCHES.findall(instruction.line):
            names += [name.strip().removeprefix("%") for name in branches.split(",")]
        return [name for name in names if name in self.computations]

    def _callers_first(self) -> list[str]:
        order: list[str] = []
        seen: set[str] = set()
        stack = [(self.entry, False)]
        while stack:
            name, done = stack.pop()
            if done:
                order.append(name)
            elif name not in seen:
                seen.add(name)
                stack.append((name, True))
                for instruction in self.computations[name]:
                    stack += [(called, False) for called in self._called(instruction)]
        return order[::-1]


def parse(text: str) -> Program:
    """Returns the module that ``text`` prints."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
            continue
        found = _INSTRUCTION.match(line)
        if found and current is not None:
            current.append(Instruction(found[2], found[3], found[4], line, bool(found[1])))
    return Program(computations, entry or next(iter(computations), ""))


def arrays(type_: str) -> list[str]:
    """Returns the arrays in a type, as ``bf16[8,128]``, without layouts."""
    return [f"{dtype}[{sizes}]" for dtype, sizes in _ARRAY.findall(type_) if _bits(dtype)]


def elements(type_: str) -> list[str]:
    """Returns the parts of a tuple type, or the type alone."""
    inner = re.sub(r"/\*.*?\*/", "", type_.strip())
    if not inner.startswith("("):
        return [inner]
    parts, depth, start = [], 0, 1
    for place, letter in enumerate(inner):
        depth += letter in "([{"
        depth -= letter in ")]}"
        if (letter == "," and depth == 1) or depth == 0:
            parts.append(inner[start:place].strip())
            start = place + 1
    return parts


def size(type_: str) -> int:
    """Returns the bytes of all arrays in a type, without the padding of layouts."""
    total = 0
    for dtype, sizes in _ARRAY.findall(type_):
        total += math.prod(int(n) for n in sizes.split(",") if n) * _bits(dtype)
    return total // 8


def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    found = re.match(r"(?:bf|f|s|u|c)(\d+)", dtype)
    return int(found[1]) if found else 0
