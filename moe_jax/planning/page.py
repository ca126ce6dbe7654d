"""Formats plans for a terminal."""

from __future__ import annotations

from typing import Any


def plan(record: dict[str, Any]) -> str:
    """Returns one plan as text."""
    memory, compiled = record["bytes_per_device"], record["compiled"]
    lines = [
        _title(record),
        f"batch       {record['batch']['tokens']:,} tokens in {record['microbatches']} "
        f"microbatches, remat {record['remat']}",
        f"program     {_program(compiled)}",
        "per device  "
        + ", ".join(
            f"{name} {human(memory[name])}"
            for name in ("parameters", "optimizer", "activations", "temporaries", "peak")
        )
        + (f" of {human(memory['hbm'])}" if memory["hbm"] else ""),
        *_details(record),
    ]
    return "\n".join(lines + _speed(record))


def decoding(record: dict[str, Any]) -> str:
    """Returns the plan of a decode step as text."""
    memory, read, bound = (
        record[name] for name in ("bytes_per_device", "bytes_read_per_device", "roofline")
    )
    asked = record["decoding"]
    lines = [
        _title(record),
        f"requests    {asked['batch']:,} of {asked['context']:,} tokens, in {record['type']}",
        f"program     {_program(record['compiled'])}",
        "per device  "
        + ", ".join(
            f"{name} {human(memory[name])}"
            for name in ("parameters", "cache", "temporaries", "peak")
        )
        + (f" of {human(memory['hbm'])}" if memory["hbm"] else ""),
        "read        " + ", ".join(f"{name} {human(size)}" for name, size in read.items()),
        *_details(record),
    ]
    if bound:
        names = ("compute", "parameters", "cache", "links")
        lines.append(
            f"at best     {bound['step_seconds']:.3g} s a step, {bound['tokens_per_second']:,.0f} "
            f"tokens/s, bound by {bound['bound']} ({_seconds(bound, names)})"
        )
    return "\n".join(lines)


def _title(record: dict[str, Any]) -> str:
    return (
        f"{record['name']}: {record['parameters'] / 1e9:,.1f}B parameters on {record['topology']} "
        f"({record['chips']:,} chips), mesh {mesh(record)}"
    )


def _details(record: dict[str, Any]) -> list[str]:
    """Returns lines for missing memory, the largest buffers and the collectives."""
    memory, compiled, lines = record["bytes_per_device"], record["compiled"], []
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
    return lines


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
    seconds = _seconds(bound, ("compute", "memory", "beside", "in_the_way"))
    return [
        line,
        f"at best     {bound['step_seconds']:.3g} s a step, {bound['tokens_per_second']:,.0f} "
        f"tokens/s, {100 * bound['mfu']:.1f} % MFU, bound by {bound['bound']} ({seconds})",
    ]


def _seconds(bound: dict[str, Any], names: tuple[str, ...]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {bound[f'{name}_seconds']:.3g} s" for name in names)


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
