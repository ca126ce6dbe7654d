"""Formats plans for a terminal."""

from __future__ import annotations

from typing import Any


def plan(record: dict[str, Any]) -> str:
    """Returns one plan as text."""
    memory, compiled = record["bytes_per_device"], record["compiled"]
    lines = [
        f"{record['name']}: {record['parameters'] / 1e9:,.1f}B parameters on {record['topology']} "
        f"({record['chips']:,} chips), mesh {mesh(record)}",
        f"batch       {record['batch']['tokens']:,} tokens in {record['microbatches']} "
        f"microbatches, remat {record['remat']}",
        f"program     {_program(compiled)}",
        "per device  "
        + ", ".join(
            f"{name} {human(memory[name])}"
            for name in ("parameters", "optimizer", "activations", "temporaries", "peak")
        )
        + (f" of {human(memory['hbm'])}" if memory["hbm"] else ""),
    ]
    if not record["fits"]:
        lines.append(f"            DOES NOT FIT: {human(memory['missing'])} too much")
    for buffer in compiled["largest_buffers"] if compiled else ():
        lines.append(
            f"largest     {human(buffer['bytes'])} {buffer['shape']} {buffer['operation']}"
        )
    for one in record["collectives"]:
        lines.append(
            f"sent        {human(one['bytes'])} {one['kind']} over {' x '.join(one['axes'])}, "
            f"{one['count']} in the program, {one['executed']} times a step"
        )
    return "\n".join(lines + _speed(record))


def _program(compiled: dict[str, Any] | None) -> str:
    if compiled is None:
        return "not compiled: by formula"
    if compiled["ok"]:
        return f"compiles in {compiled['seconds']:.0f} s"
    return compiled["error"].splitlines()[0]


def _speed(record: dict[str, Any]) -> list[str]:
    flops, bound = record["flops_per_step"], record["roofline"]
    line = (
        f"FLOPs       {flops['model']:.3g} of the model, {flops['hardware']:.3g} computed, a step"
    )
    if not bound:
        return [line]
    seconds = ", ".join(
        f"{name.replace('_', ' ')} {bound[f'{name}_seconds']:.3g} s"
        for name in ("compute", "memory", "beside", "in_the_way")
    )
    return [
        line,
        f"at best     {bound['step_seconds']:.3g} s a step, {bound['tokens_per_second']:,.0f} "
        f"tokens/s, {100 * bound['mfu']:.1f} % MFU, bound by {bound['bound']} ({seconds})",
    ]


def sweep(record: dict[str, Any]) -> str:
    """Returns a sweep as text, best plan first."""
    lines = [f"{record['name']}: mesh, remat, fits, peak per device, seconds a step, MFU"]
    for one in record["plans"]:
        bound = one["roofline"]
        speed = f"{bound['step_seconds']:.3g} s, {100 * bound['mfu']:.1f} %" if bound else ""
        how = "compiled" if one["compiled"] else "by formula"
        fits = "fits" if one["fits"] else "does not fit"
        lines.append(
            f"{mesh(one)}, {one['remat']}, {fits} ({how}), "
            f"{human(one['bytes_per_device']['peak'])}, {speed}"
        )
    return "\n".join(lines)


def mesh(record: dict[str, Any]) -> str:
    """Returns the mesh axes that have more than one device, with their sizes."""
    axes = [f"{axis}={size}" for axis, size in record["mesh"].items() if size > 1]
    return " x ".join(axes) or "of one device"


def human(size: float) -> str:
    """Returns a number of bytes with three digits, in B, KiB, MiB, GiB or TiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"
