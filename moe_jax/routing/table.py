"""Writes the table of presets from the presets themselves.

The command ``python -m moe_jax.routing.table > docs/routers.md`` writes the page.
"""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from collections.abc import Callable
from typing import Any

from moe_jax.routing import presets
from moe_jax.routing.router import Router

COLUMNS = ("router", "score", "select", "balance", "capacity", "combine weight", "source")
_INTRODUCTION = """\
# Routers

A router has four parts: score, select, balance and capacity. Each part is chosen independently. A
preset is one published combination with the settings of its source. A cell shows only the settings
that differ from the defaults of the part. The column `score` also shows the head and other settings
of the router, if they differ from the defaults.

`--config.model.moe.router.preset=NAME` selects a preset, and
`--config.model.moe.router.CHOICE=VALUE` changes one of its settings, called
[choices](config_reference.md#choices-of-the-router-presets). A config may also give
[the four parts](config.md#router).

`python -m moe_jax.routing.table > docs/routers.md` writes this page from the presets.

"""


def in_words(part: Any) -> str:
    """Returns a part as its constructor call in code, without arguments that have their default."""
    if dataclasses.is_dataclass(part):
        shown = [
            f"{field.name}={in_words(getattr(part, field.name))}"
            for field in dataclasses.fields(part)
            if field.name != "name" and _differs(getattr(part, field.name), field)
        ]
        return f"{type(part).__name__}({', '.join(shown)})"
    return repr(part)


def _differs(value: Any, field: dataclasses.Field) -> bool:
    if field.default is not dataclasses.MISSING:
        return value != field.default
    return field.default_factory is dataclasses.MISSING or value != field.default_factory()


def combine_weight(router: Router) -> str:
    """Returns a description of the combine weights."""
    gate = router.select.gate()
    if router.capacity.renormalize:
        gate += " / sum over choices with a slot"
    return f"1; {gate} on the input" if router.gate_on == "in" else gate


def row(function: Callable[..., Router]) -> tuple[str, ...]:
    """Returns the cells of one preset, one per column of ``COLUMNS``."""
    router = function()
    extra = [in_words(router.head)] if _differs(router.head, _field("head")) else []
    if router.free.count:
        extra.append(in_words(router.free))
    if router.input_jitter:
        extra.append(f"input_jitter={router.input_jitter}")
    if router.input_dropout:
        extra.append(f"input_dropout={router.input_dropout}")
    if not router.mask_padding:
        extra.append("mask_padding=False")
    score = "; ".join([in_words(router.score), *extra])
    balance = ", ".join(map(in_words, router.balance)) or "none"
    cells = (score, in_words(router.select), balance, in_words(router.capacity))
    source = textwrap.dedent(function.__doc__ or "").strip().splitlines()[0]
    return (
        f"`{function.__name__}`",
        *(f"`{cell}`" if cell != "none" else cell for cell in cells),
        combine_weight(router),
        source.replace("|", "/"),
    )


def _field(name: str) -> dataclasses.Field:
    return next(field for field in dataclasses.fields(Router) if field.name == name)


def table() -> str:
    """Returns the whole page as Markdown."""
    lines = [_line(COLUMNS), _line(("---",) * len(COLUMNS))]
    lines += [_line(row(function)) for function in presets.PRESETS]
    return _INTRODUCTION + "\n".join(lines) + "\n"


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.stdout.write(table())
