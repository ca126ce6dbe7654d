"""Parses the text of a compiled program: computations, instructions, and their executions.

The parser reads only the stable parts of the format: each line is an instruction
``name = type operation(operands), attributes``, in a block with the name of a computation
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
_OPERAND = re.compile(r"%([\w.\-]+)")
_INDEX = re.compile(r"get-tuple-element\(.*index=(\d+)")
_INTEGER = re.compile(r"^[su]\d+\[\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        name: Name without ``%``.
        type: Type of the result, with layouts.
        operation: Name of the operation, such as ``all-gather-start``.
        line: Text of the whole line.
        root: True if the instruction is the result of its computation.
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
        computations: Instructions of each computation, by its name.
        entry: Name of the computation that runs first.
    """

    computations: dict[str, list[Instruction]]
    entry: str

    @functools.cached_property
    def times(self) -> dict[str, int]:
        """Executions of each computation per run; every branch of a condition counts."""
        counts: collections.Counter[str] = collections.Counter({self.entry: 1})
        for name in self._callers_first():
            for instruction in self.computations[name]:
                trips = self.trips(instruction) if instruction.operation == "while" else 1
                for called in self._called(instruction):
                    counts[called] += counts[name] * trips
        return dict(counts)

    def trips(self, loop: Instruction) -> int:
        """Returns the number of executions of the body of a ``while``.

        The number is ``known_trip_count``, or else the only constant in the loop's condition, which
        is the length of a ``jax.lax.scan``, over the step of the loop's counter, which is 2 in a
        loop that XLA unrolled once. It is 1 if the length is unknown, as in a search.
        """
        known = _TRIPS.search(loop.line)
        if known:
            return int(known[1])
        condition = self._computation(loop, "condition")
        constants = [
            value
            for instruction in condition
            if (value := _constant(instruction)) is not None and _INTEGER.match(instruction.type)
        ]
        if len(constants) != 1:
            return 1
        return -(-constants[0] // self._step(condition, self._computation(loop, "body")))

    def _step(self, condition: list[Instruction], body: list[Instruction]) -> int:
        """Returns the constant that a loop's body adds to the counter, or 1 if it is not seen."""
        counters = [_INDEX.search(one.line) for one in condition if _INTEGER.match(one.type)]
        places = [int(found[1]) for found in counters if found]
        root = next((one for one in body if one.root and one.operation == "tuple"), None)
        if root is None or len(places) != 1:
            return 1
        names = {one.name: one for one in body}
        results = _OPERAND.findall(root.line.partition(" tuple(")[2].partition(")")[0])
        counter = names.get(results[places[0]]) if places[0] < len(results) else None
        if counter is None or counter.operation != "add":
            return 1
        added = _OPERAND.findall(counter.line.partition(" add(")[2].partition(")")[0])
        steps = [_constant(names[name]) for name in added if name in names]
        return next((step for step in steps if step), 1)

    def _computation(self, loop: Instruction, part: str) -> list[Instruction]:
        found = re.search(rf"{part}=%?([\w.\-]+)", loop.line)
        return self.computations.get(found[1], []) if found else []

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


def _constant(instruction: Instruction) -> int | None:
    value = re.search(r" constant\((\d+)\)", instruction.line)
    return int(value[1]) if value and instruction.operation == "constant" else None


def parse(text: str) -> Program:
    """Returns the compiled module with this text."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
            continue
        match = _INSTRUCTION.match(line)
        if match and current is not None:
            current.append(Instruction(match[2], match[3], match[4], line, bool(match[1])))
    return Program(computations, entry or next(iter(computations), ""))


def arrays(type_: str) -> list[str]:
    """Returns the arrays in a type, such as ``bf16[8,128]``, without layouts."""
    return [f"{dtype}[{sizes}]" for dtype, sizes in _ARRAY.findall(type_) if _bits(dtype)]


def elements(type_: str) -> list[str]:
    """Returns the elements of a tuple type, or any other type as the only element."""
    inner = re.sub(r"/\*.*?\*/", "", type_.strip())
    if not inner.startswith("("):
        return [inner]
    parts, depth, start = [], 0, 1
    for index, letter in enumerate(inner):
        depth += letter in "([{"
        depth -= letter in ")]}"
        if (letter == "," and depth == 1) or depth == 0:
            parts.append(inner[start:index].strip())
            start = index + 1
    return parts


def operands(one: Instruction, computation: list[Instruction]) -> list[str]:
    """Returns the types of an instruction's operands, in order.

    Args:
        one: The instruction.
        computation: All instructions of its computation.
    """
    inside = one.line.partition(f" {one.operation}(")[2].partition(")")[0]
    types = {other.name: other.type for other in computation}
    return [types[name] for name in _OPERAND.findall(inside) if name in types]


def size(type_: str) -> int:
    """Returns the bytes of all arrays in a type, without the padding of layouts."""
    total = 0
    for dtype, sizes in _ARRAY.findall(type_):
        total += math.prod(int(n) for n in sizes.split(",") if n) * _bits(dtype)
    return total // 8


def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    bits = re.match(r"(?:bf|f|s|u|c)(\d+)", dtype)
    return int(bits[1]) if bits else 0
