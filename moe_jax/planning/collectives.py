"""Lists the collectives of a compiled program, with their bytes and mesh axes."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from moe_jax.planning import hlo

KINDS = (
    "all-to-all",
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_ORDER = re.compile(r"device_ids=\(?(?:\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
_LISTS = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_NAMED = re.compile(r"replica_groups=@?mesh(\[[^{]*)\{([^}]*)\}")
_AXIS = re.compile(r"'([^']+)'(?:=(\d+))?(?::\((\d+)\)(\d+))?")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
        kind: One of ``KINDS``; an asynchronous instruction has the kind of the synchronous one.
        axes: Mesh axes along which the devices of a group differ, in the order of the mesh.
        devices: Number of devices in a group.
        shape: Arrays of the result, joined by ``+`` if there are several.
        bytes: Bytes that one device sends per execution of the instruction, by the algorithm that
            sends least: for ``n`` devices, ``(n - 1) / n`` of the whole array for all-gather,
            reduce-scatter and all-to-all, twice this for all-reduce, and the whole array for a
            permutation (https://jax-ml.github.io/scaling-book/sharding).
        times: Executions of the instruction per execution of the program.
    """

    kind: str
    axes: tuple[str, ...]
    devices: int
    shape: str
    bytes: int
    times: int

    @property
    def total_bytes(self) -> int:
        """Bytes that one device sends per execution of the program."""
        return self.bytes * self.times


def collectives(hlo_text: str, mesh: Mesh | AbstractMesh) -> list[Collective]:
    """Returns the collectives of a compiled program, in the order of its text.

    Collectives within one device (groups of one) are omitted. A collective that the compiler has
    split into steps that overlap with computation (fusions with the same ``chain_id``) counts once.

    Args:
        hlo_text: ``compiled.as_text()`` of a program that ``jax.jit`` partitioned over ``mesh``;
            partition ``i`` is device ``i`` of the flattened mesh.
        mesh: The mesh.
    """
    program = hlo.parse(hlo_text)
    found: list[Collective] = []
    chains: set[tuple[str, str]] = set()
    for name, times in _running(program):
        scatters = name.startswith("all-reduce-scatter")
        for instruction in program.computations[name]:
            kind = instruction.operation.removesuffix("-start")
            if kind not in KINDS:
                continue
            chain = _chain(instruction)
            if chain in chains:
                continue
            chains |= {chain} if chain else set()
            if scatters and kind == "all-reduce":
                kind, instruction = "reduce-scatter", _with_type(instruction, program, name)
            if kind == "ragged-all-to-all":
                instruction = _with_fewest_rows(instruction, program, name)
            one = _collective(kind, instruction, times, mesh)
            found += [one] if one.devices > 1 else []
    return found


def summary(found: Iterable[Collective]) -> list[dict[str, Any]]:
    """Returns the collectives grouped by kind and axes, as plain data, most bytes first.

    In each group ``count`` is the number of instructions in the program, ``executed`` the number of
    their executions per step, and ``bytes`` the bytes that one device sends per step.
    """
    groups: dict[tuple[str, tuple[str, ...]], list[Collective]] = collections.defaultdict(list)
    for one in found:
        groups[one.kind, one.axes].append(one)
    records = [
        {
            "kind": kind,
            "axes": list(axes),
            "count": len(ones),
            "executed": sum(one.times for one in ones),
            "bytes": sum(one.total_bytes for one in ones),
        }
        for (kind, axes), ones in groups.items()
    ]
    return sorted(records, key=lambda record: (-record["bytes"], record["kind"], record["axes"]))


def _running(program: hlo.Program) -> Iterable[tuple[str, int]]:
    for name in program.computations:
        if program.times.get(name):
            yield name, program.times[name]


def _chain(instruction: hlo.Instruction) -> tuple[str, str] | None:
    chain = re.search(r'chain_id="(\w+)"', instruction.line)
    channel = re.search(r"channel_id=(\d+)", instruction.line)
    return (chain[1], channel[1] if channel else "") if chain else None


def _with_type(
    instruction: hlo.Instruction, program: hlo.Program, computation: str
) -> hlo.Instruction:
    """Returns the all-reduce of a fusion with the type of the fusion's result.

    A TPU fuses an all-reduce and a slice into a reduce-scatter, which has the type of the slice.
    """
    root = next(x for x in program.computations[computation] if x.root)
    return dataclasses.replace(instruction, type=root.type)


def _with_fewest_rows(
    instruction: hlo.Instruction, program: hlo.Program, computation: str
) -> hlo.Instruction:
    """Returns an exchange of unequal parts with the type of its smaller side.

    One side holds a row for each choice, and the other is a buffer that may have room for more.
    """
    sent = hlo.operands(instruction, program.computations[computation])[:1]
    smaller = min([instruction.type, *sent], key=hlo.size)
    return dataclasses.replace(instruction, type=smaller)


def _collective(
    kind: str, instruction: hlo.Instruction, times: int, mesh: Mesh | AbstractMesh
) -> Collective:
    groups = _groups(instruction.line, math.prod(mesh.shape.values()))
    type_ = instruction.type
    if instruction.operation.endswith("-start") and kind != "all-reduce":
        # A start instruction returns the tuple (operands, result, ...).
        parts = hlo.elements(type_)
        type_ = parts[1] if len(parts) > 1 else type_
    devices = groups.shape[1] if kind != "collective-permute" else 2
    axes = _axes(groups, mesh)
    return Collective(
        kind=kind,
        axes=axes,
        devices=devices if axes else 1,
        shape=" + ".join(hlo.arrays(type_)),
        bytes=_sent(kind, hlo.size(type_), devices),
        times=times,
    )


def _sent(kind: str, size: int, devices: int) -> int:
    match kind:
        case "all-reduce":
            return 2 * size * (devices - 1) // devices
        case "reduce-scatter":
            return size * (devices - 1)
        case "collective-permute" | "collective-broadcast":
            return size
    return size * (devices - 1) // devices


def _groups(line: str, total: int) -> np.ndarray:
    """Returns device positions ``(groups, members)``; for a permutation, its pairs."""
    pairs = _PAIRS.search(line)
    if pairs:
        return _numbers(pairs[1])
    named = _NAMED.search(line)
    if named:
        return _named_groups(named[1], named[2])
    lists = _LISTS.search(line)
    if lists and lists[1]:
        return _numbers(lists[1])
    text = re.search(r"replica_groups=(\S+)", line)
    iota = _IOTA.match(text[1]) if text else None
    return _iota(*iota.groups()) if iota else np.arange(total)[None]


def _numbers(text: str) -> np.ndarray:
    return np.array([_ints(group) for group in re.findall(r"\{([\d,]*)\}", text)])


def _ints(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _iota(shape: str, source: str, order: str | None) -> np.ndarray:
    """Returns the groups ``[2,4]<=[4,2]T(1,0)``: a range of shape (4, 2), transposed to (2, 4)."""
    return _count_up(source, order).reshape(_ints(shape))


def _count_up(shape: str, order: str | None) -> np.ndarray:
    numbers = np.arange(math.prod(_ints(shape))).reshape(_ints(shape))
    return numbers.transpose(_ints(order)) if order else numbers


def _named_groups(mesh: str, chosen: str) -> np.ndarray:
    """Returns the groups ``mesh['a'=2,'b'=4] {'b':(1)2}`` along axes or along a part of an axis.

    ``(p)s`` is the part of size ``s`` of an axis that has ``p`` more significant positions.
    """
    sizes = {name: int(size) for name, size, _, _ in _AXIS.findall(mesh.split("]")[0])}
    devices = np.arange(math.prod(sizes.values()))
    order = _ORDER.search(mesh)
    if order:
        devices = _count_up(order[1], order[2]) if order[1] else np.array(_ints(order[3]))
    cuts: list[tuple[str, int, int]] = []
    for name, size in sizes.items():
        part = next((m for m in _AXIS.findall(chosen) if m[0] == name and m[2]), None)
        before, own = (int(part[2]), int(part[3])) if part else (1, size)
        cuts += [("", 0, before), (name, 1, own), ("", 0, size // (before * own))]
    wanted = [name for name, *_ in _AXIS.findall(chosen)]
    places = [next(i for i, cut in enumerate(cuts) if cut[0] == name) for name in wanted]
    others = [i for i in range(len(cuts)) if i not in places]
    members = math.prod(cuts[i][2] for i in places)
    shaped = devices.reshape([cut[2] for cut in cuts])
    return shaped.transpose(others + places).reshape(-1, members)


def _axes(groups: np.ndarray, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    names, sizes = tuple(mesh.shape), tuple(mesh.shape.values())
    places = np.unravel_index(groups, sizes)
    return tuple(
        name for name, place in zip(names, places, strict=True) if (place != place[:, :1]).any()
    )


def of_compiled(compiled: jax.stages.Compiled, mesh: Mesh | AbstractMesh) -> list[Collective]:
    """Returns the collectives of the result of ``jax.jit(...).lower(...).compile()``.

    Raises:
        ValueError: If the backend does not print compiled programs.
    """
    text = compiled.as_text()
    if text is None:
        raise ValueError("this backend does not print compiled programs")
    return collectives(text, mesh)
