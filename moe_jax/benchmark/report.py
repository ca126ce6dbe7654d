"""Lines, table and baseline of measured rows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from moe_jax.benchmark.measure import Measurement
from moe_jax.errors import ConfigError

# A row may have a share of the ceiling that is smaller by this factor.
LARGEST = 1.05
_KEY = ("shape", "regime", "part", "name", "direction", "dtype")
_HEADER = ("shape", "regime", "part", "name", "direction", "ms p20/p50/p80")
_MEASURED = ("TFLOP/s", "of matmul", "MiB", "repeats", "error")


def lines(rows: Sequence[Measurement], device: str) -> str:
    """Returns one line of JSON per row, each with the name of the device."""
    records = ({"device": device, **dataclasses.asdict(row)} for row in rows)
    return "".join(json.dumps(record) + "\n" for record in records)


def table(rows: Sequence[Measurement]) -> str:
    """Returns the rows as an aligned table; a skipped row has its reason."""
    cells = [[*_HEADER, *_MEASURED], *(_cells(row) for row in rows)]
    widths = [
        max(len(line[i]) for line in cells if i < len(line) - 1) for i in range(len(cells[0]) - 1)
    ]
    padded = (
        "  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), *line[len(widths) :]])
        for line in cells
    )
    return "\n".join(line.rstrip() for line in padded)


def _cells(row: Measurement) -> list[str]:
    place = [row.shape, row.regime, row.part, row.name, row.direction]
    if row.p20 is None or row.p50 is None or row.p80 is None:
        return [*place, f"- ({row.skipped})"]
    times = "/".join(f"{1e3 * seconds:.3g}" for seconds in (row.p20, row.p50, row.p80))
    memory = "" if row.memory is None else f"{row.memory / 2**20:.1f}"
    repeats = "" if row.repeats is None else "yes" if row.repeats else "no"
    error = "" if row.error is None else f"{row.error:.1e}"
    return [*place, times, f"{row.tflops:.3g}", f"{row.ceiling_share:.1%}", memory, repeats, error]


def draw(rows: Sequence[Measurement], path: Path) -> None:
    """Draws the share of the ceiling of each measured row, a panel per kind of work."""
    from matplotlib.figure import Figure

    panels: dict[tuple[str, ...], list[Measurement]] = {}
    for row in rows:
        if row.ceiling_share is not None:
            key = (row.shape, row.part, row.regime, row.direction)
            panels.setdefault(key, []).append(row)
    heights = [len(panel) + 1.5 for panel in panels.values()] or [1.0]
    figure = Figure((7.0, 0.25 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0]
    for one, (named, panel) in zip(axes, panels.items(), strict=False):
        ordered = sorted(panel, key=lambda row: row.ceiling_share or 0.0)
        shares = [100 * (row.ceiling_share or 0.0) for row in ordered]
        colors = ["C0" if row.name.startswith("moe_jax") else "0.6" for row in ordered]
        one.barh([row.name for row in ordered], shares, color=colors)
        one.set_title(" ".join(dict.fromkeys(named)), fontsize="small", loc="left")
        one.tick_params(labelsize="small")
    axes[-1].set_xlabel("useful FLOP/s in % of a matrix product in the same rounds")
    figure.savefig(path)


def read_baseline(path: Path) -> dict[tuple[str, ...], float]:
    """Returns the share of the ceiling of each measured row in a file of lines.

    Raises:
        ConfigError: If the file holds no such lines.
    """
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        shares = {
            tuple(record[name] for name in _KEY): float(record["ceiling_share"])
            for record in records
            if record["ceiling_share"] is not None
        }
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"--baseline={path} holds no lines of moe-jax bench") from error
    if not shares:
        raise ConfigError(f"--baseline={path} holds no measured row")
    return shares


def slower(rows: Sequence[Measurement], baseline: dict[tuple[str, ...], float]) -> list[str]:
    """Returns in words each row that misses its baseline by more than the factor ``LARGEST``.

    The ratio to the ceiling is compared, and not the time, so that the baseline of a machine holds
    while the machine is slower. A row that no longer has a time counts as missed.
    """
    found = []
    for row in rows:
        key = tuple(getattr(row, name) for name in _KEY)
        before, now = baseline.get(key), row.ceiling_share
        if before is None:
            continue
        if now is None:
            found.append(f"{' '.join(key)}: {row.skipped}")
        elif before > LARGEST * now:
            found.append(f"{' '.join(key)}: {now:.1%} of the ceiling, {before:.1%} before")
    return found
