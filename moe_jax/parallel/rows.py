"""The rows of a batch that each process holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import jax
from jax.sharding import Mesh, NamedSharding

from moe_jax.parallel.rules import spec


def rows_by_process(
    mesh: Mesh, rows: int, process_of: Callable[[jax.Device], int] = lambda d: d.process_index
) -> Mapping[int, tuple[int, ...]]:
    """Returns for each process the rows of a batch that its devices hold, in order.

    The rows of a process need not be neighbours, because a mesh follows the wiring of the chips.
    Processes that share one copy of a model hold the same rows.

    Args:
        mesh: Mesh of devices.
        rows: Number of rows of the batch; the mesh splits them evenly.
        process_of: Function that returns the process of a device.
    """
    by_process: dict[int, set[int]] = {}
    indices = NamedSharding(mesh, spec("batch")).devices_indices_map((rows,))
    for device, (part,) in indices.items():
        by_process.setdefault(process_of(device), set()).update(range(*part.indices(rows)))
    return {process: tuple(sorted(indices)) for process, indices in by_process.items()}


def fewest_parts(owned: Mapping[int, Sequence[int]], rows: int) -> int:
    """Returns the smallest number of equal parts of a batch such that no process splits a part."""
    edges = {rows}
    for indices in map(set, owned.values()):
        edges |= {row for row in indices if row - 1 not in indices}
        edges |= {row + 1 for row in indices if row + 1 not in indices}
    return rows // math.gcd(*edges)
