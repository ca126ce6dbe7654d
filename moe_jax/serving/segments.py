"""A traced function, cut where the host has work to do.

The function calls a primitive, its mark, where it needs the host. Its equations are divided into
segments, each of which computes what the next mark reads. All values stay those of the whole
function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Primitive, jaxpr_as_fun

# Equations that hold one of these are computed as soon as their inputs are there. All others wait
# for the first equation that reads them, as they do in a fusion of the whole function.
_PRODUCTS = frozenset({"dot_general", "conv_general_dilated", "while", "scan", "pallas_call"})


@dataclasses.dataclass(frozen=True)
class Segment:
    """Equations that run without the host.

    Attributes:
        jaxpr: The equations; their inputs and outputs are variables of the whole function.
        mark: The mark after the segment, which reads outputs of this or an earlier one; ``None``
            after the last segment.
    """

    jaxpr: Jaxpr
    mark: JaxprEqn | None

    def __call__(self, *values: Any) -> list[Any]:
        """Returns the outputs of the segment for the values of its inputs."""
        return jaxpr_as_fun(ClosedJaxpr(self.jaxpr, []))(*values)


def segments_of(whole: Jaxpr, mark: Primitive) -> list[Segment]:
    """Returns the segments of a function in order: one before each mark, and the last one."""
    places = _places(whole, mark)
    marks = [each for each in whole.eqns if each.primitive is mark]
    parts: list[list[JaxprEqn]] = [[] for _ in range(len(marks) + 1)]
    for each, place in zip(whole.eqns, places, strict=True):
        if place is not None and each.primitive is not mark:
            parts[place].append(each)
    needed = _variables(whole.outvars)
    segments: list[Segment] = []
    for part, bound in zip(reversed(parts), [None, *reversed(marks)], strict=True):
        needed |= _variables(bound.invars if bound else ())
        made = dict.fromkeys(out for each in part for out in each.outvars)
        inputs = _variables(atom for each in part for atom in each.invars)
        outputs = [out for out in made if out in needed]
        inputs = {atom: None for atom in inputs if atom not in made}
        jaxpr = whole.replace(constvars=[], invars=[*inputs], outvars=outputs, eqns=part)
        segments.append(Segment(jaxpr, bound))
        needed |= inputs
    return segments[::-1]


def without_notes(whole: Jaxpr, mark: Primitive, note: Primitive) -> Jaxpr:
    """Returns the function with every note as further inputs of the next mark.

    Args:
        whole: The traced function.
        mark: Primitive of the marks.
        note: Primitive whose output is its first input; its others are noted.
    """
    aliases: dict[Any, Any] = {}

    def same(atom: Any) -> Any:
        return atom if isinstance(atom, Literal) else aliases.get(atom, atom)

    equations: list[JaxprEqn] = []
    noted: list[Any] = []
    for each in whole.eqns:
        inputs = [same(atom) for atom in each.invars]
        if each.primitive is note:
            aliases[each.outvars[0]] = inputs[0]
            noted += inputs[1:]
            continue
        if each.primitive is mark:
            inputs, noted = [*inputs, *noted], []
        equations.append(each.replace(invars=inputs))
    return whole.replace(eqns=equations, outvars=[same(atom) for atom in whole.outvars])


def _places(whole: Jaxpr, mark: Primitive) -> list[int | None]:
    """Returns the segment of each equation and mark, ``None`` if nothing reads it."""
    levels, known = _levels(whole, mark)
    read = {atom: known.get(atom, 0) for atom in _variables(whole.outvars)}
    places: list[int | None] = []
    for each, level in zip(reversed(whole.eqns), reversed(levels), strict=True):
        users = [read[out] for out in each.outvars if out in read]
        early = each.primitive is mark or _multiplies(each)
        place = None if not users else level if early else min(users)
        places.append(place)
        if place is not None:
            read |= {atom: min(place, read.get(atom, place)) for atom in _variables(each.invars)}
    return places[::-1]


def _levels(whole: Jaxpr, mark: Primitive) -> tuple[list[int], dict[Any, int]]:
    """Returns the number of marks before each equation, and before each variable is known."""
    known: dict[Any, int] = {}
    levels, marks = [], 0
    for each in whole.eqns:
        level = max((known.get(atom, 0) for atom in _variables(each.invars)), default=0)
        if each.primitive is mark:
            level, marks = marks, marks + 1
        levels.append(level)
        known |= dict.fromkeys(each.outvars, level + (each.primitive is mark))
    return levels, known


def _multiplies(equation: JaxprEqn) -> bool:
    """Returns True if an equation has a product of matrices or a loop, at any depth."""
    if equation.primitive.name in _PRODUCTS:
        return True
    inner = (getattr(each, "jaxpr", each) for each in equation.params.values())
    return any(_multiplies(own) for each in inner if isinstance(each, Jaxpr) for own in each.eqns)


def _variables(atoms: Iterable[Any] | Sequence[Any]) -> dict[Any, None]:
    """Returns the variables among atoms, in order and once."""
    return dict.fromkeys(atom for atom in atoms if not isinstance(atom, Literal))
