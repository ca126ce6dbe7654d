"""Which rows of a batch each process holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import jax
from jax.sharding import Mesh, NamedSharding

from moe_jax.parallel.rules import spec


def rows_by_process(
    mesh: Mesh, rows: int, process_of: Callable[[jax.Device], int] = lambda d: d.process_index
) -> Mapping[int, tuple[int, ...]]:
    """Returns which rows of a batch the devices of each process hold, in order.

    They need not be neighbours, as a mesh follows the wiring of the chips, and processes that
    split a model between them hold the same rows.

    Args:
        mesh: the devices.
        rows: of the batch; the mesh splits them evenly.
        process_of: of a device.
    """
    found: dict[int, set[int]] = {}
    indices = NamedSharding(mesh, spec("batch")).devices_indices_map((rows,))
    for device, (part,) in indices.items():
        found.setdefault(process_of(device), set()).update(range(*part.indices(rows)))
    return {process: tuple(sorted(own)) for process, own in found.items()}


def fewest_parts(owned: Mapping[int, Sequence[int]], rows: int) -> int:
    """Returns into how few equal parts a batch can be cut so that each process has whole parts."""
    edges = {rows}
    for own in owned.values():
        kept = set(own)
        edges |= {row for row in own if row - 1 not in kept}
        edges |= {row + 1 for row in own if row + 1 not in kept}
    return rows // math.gcd(*edges)
