"""Writes ``docs/config_reference.md``: every setting, its type, range, default and meaning.

``python -m tools.config_reference`` reads the dataclasses of the settings and the ``Attributes:``
sections of their docstrings. ``--check`` writes nothing and fails if the page is out of date.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_jax import routing
from moe_jax.config.experiment import Experiment
from moe_jax.config.reference import attributes, classes, default, is_interface, kind, summary

PAGE = Path(__file__).parents[1] / "docs" / "config_reference.md"
_INTRODUCTION = """\
# Config reference

Every setting of a run. A setting is overridden on the command line by its full name:
`--config.model.moe.num_experts=16`. Where a setting has several possible classes, the key `type`
selects one (`--config.optimizer.rule.type=Adafactor`), and the settings of that class stand beside
`type`. An unknown name, a value of the wrong type or a number outside its range is an error before
anything is compiled.

This page is written by `python -m tools.config_reference` from the dataclasses that hold the
settings and from their docstrings.
"""
_PRESETS = """\
## Choices of the router presets

`model.moe.router.preset` names a published router ([the table](routers.md)); the choices below
stand beside it, such as `--config.model.moe.router.capacity_factor=2.0`. `None` keeps the value of
the preset.

| preset | choices and their defaults |
| --- | --- |
"""


@dataclasses.dataclass(frozen=True)
class ReferenceSection:
    """One class of settings.

    Attributes:
        cls: The dataclass.
        paths: Dotted names of the settings that hold it, the shortest name first.
        alternative: True if the key ``type`` selects it among several classes.
    """

    cls: type
    paths: tuple[str, ...]
    alternative: bool


def sections(root: type = Experiment) -> list[ReferenceSection]:
    """Returns every class of settings that ``root`` reaches, each one once; routers come last."""
    found: dict[type, ReferenceSection] = {}
    for path, cls, alternative in _walk(root, "", False, ()):
        paths = {path, *(found[cls].paths if cls in found else ())}
        found[cls] = ReferenceSection(
            cls, tuple(sorted(paths, key=lambda p: (len(p), p))), alternative
        )
    return sorted(found.values(), key=lambda section: ".router" in section.paths[0])


def _walk(
    cls: type, path: str, alternative: bool, parents: tuple[type, ...]
) -> Iterator[tuple[str, type, bool]]:
    yield path, cls, alternative
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        options = classes(hints[field.name])
        name = f"{path}.{field.name}" if path else field.name
        several = len(options) > 1 or is_interface(hints[field.name])
        for option in options:
            if option not in (cls, *parents):
                yield from _walk(option, name, several, (cls, *parents))


def _in_markdown(text: str) -> str:
    text = text[:1].upper() + text[1:]
    return text.replace("``", "`").replace("|", "\\|")


def _anchor(cls: type) -> str:
    return cls.__name__.lower()


def _link(cls: type) -> str:
    return f"[{cls.__name__}](#{_anchor(cls)})"


def rendered(section: ReferenceSection) -> str:
    """Returns the heading, the summary and the table of one class."""
    cls = section.cls
    first, *others = section.paths
    title = first or "The run"
    title += f": {cls.__name__}" if section.alternative else ""
    also = f"\nAlso at {', '.join(f'`{path}`' for path in others)}.\n" if others else ""
    lines = [f"## {title} {{ #{_anchor(cls)} }}", "", _in_markdown(summary(cls)), also]
    meanings, hints = attributes(cls), typing.get_type_hints(cls, include_extras=True)
    rows = [
        f"| `{f.name}` | {kind(hints[f.name], _link)} | {default(f)} | "
        f"{_in_markdown(meanings.get(f.name, ''))} |"
        for f in dataclasses.fields(cls)
    ]
    table = ["| setting | type | default | meaning |", "| --- | --- | --- | --- |", *rows, ""]
    return "\n".join(lines + (table if rows else ["It has no settings.", ""]))


def presets() -> str:
    """Returns the choices of every router preset."""
    return _PRESETS + "".join(
        f"| `{function.__name__}` | {_choices(function)} |\n" for function in routing.PRESETS
    )


def _choices(function: Any) -> str:
    parameters = inspect.signature(function).parameters.values()
    return ", ".join(f"`{p.name}={p.default!r}`" for p in parameters) or "none"


def page() -> str:
    """Returns the whole page."""
    return "\n".join([_INTRODUCTION, *map(rendered, sections()), presets()])


def main(arguments: list[str] | None = None) -> int:
    """Writes or checks the page, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    check = parser.parse_args(arguments).check
    text = page()
    current = PAGE.exists() and PAGE.read_text() == text
    if check:
        if not current:
            print(f"{PAGE.name} is out of date: run python -m tools.config_reference")
        return 0 if current else 1
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
