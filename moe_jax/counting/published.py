"""Counts all published models in a folder of configs, and compares them with printed numbers."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from moe_jax.config.experiment import Experiment
from moe_jax.config.schema import build
from moe_jax.counting.claims import PublishedNumber, record
from moe_jax.errors import ConfigError

_HEADER = """# Published models, counted

This page compares the numbers that papers and release notes print with numbers counted on the real
modules of each config in `configs/published`. The command
`moe-jax count --all --output=docs/published.md` writes it.

* `total` counts all parameters.
* `active.embedding_and_head` counts the parameters that one token uses, with the embedding and the
  head. `active.no_input_embedding` leaves the input embedding out, as some papers do.
* FLOPs per sequence are counted as Switch and ST-MoE do (`kaplan`) or as DeepSeekMoE does (`full`).
* A row with "not reproduced" gives the reason why the printed value cannot be right.

| config | quantity | printed | counted | deviation | source |
|---|---|---|---|---|---|
"""


@dataclasses.dataclass(frozen=True)
class PublishedModel:
    """A config file of a published model.

    Attributes:
        name: Name of the file without ``.py``.
        config: Configuration that the file's ``get_config`` returns.
        claims: Printed numbers of the model.
    """

    name: str
    config: ConfigDict
    claims: tuple[PublishedNumber, ...]

    def experiment(self) -> Experiment:
        """Returns the typed configuration."""
        return build(Experiment, self.config)

    def record(self) -> dict[str, Any]:
        """Returns the counts of the model."""
        experiment = self.experiment()
        return record(experiment.model, experiment.vocab_size, experiment.sequence)


def load(path: Path) -> PublishedModel:
    """Returns the published model of one config file.

    Raises:
        ConfigError: If the file is no Python file, or lacks ``get_config`` or ``PUBLISHED``.
    """
    spec = importlib.util.spec_from_file_location(path.stem.replace(".", "_"), path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("get_config", "PUBLISHED"):
        if not hasattr(module, name):
            raise ConfigError(
                f"{path} has no {name}: a published model needs get_config and PUBLISHED"
            )
    return PublishedModel(path.stem, module.get_config(), module.PUBLISHED)


def load_all(folder: Path) -> Iterator[PublishedModel]:
    """Yields the published model of every config file in a folder, in the order of the names.

    Raises:
        ConfigError: If the folder has no config files.
    """
    paths = sorted(path for path in folder.glob("*.py") if path.stem != "__init__")
    if not paths:
        raise ConfigError(f"{folder} has no config files: leave --folder out")
    yield from map(load, paths)


def table(folder: Path) -> str:
    """Returns the table of all models in a folder as Markdown."""
    rows = [row for published in load_all(folder) for row in _rows(published)]
    return _HEADER + "\n".join(rows) + "\n"


def _rows(published: PublishedModel) -> Iterator[str]:
    found = published.record()
    if not published.claims:
        yield f"| `{published.name}` | total | – | {_short(found['total'])} | – | not printed |"
    for claim in published.claims:
        source = f"{claim.source}; not reproduced: {claim.wrong}" if claim.wrong else claim.source
        cells = (
            f"`{published.name}`",
            claim.quantity,
            _short(claim.value),
            _short(claim.counted(found)),
            f"{100 * claim.deviation(found):+.2f} %",
            source,
        )
        yield f"| {' | '.join(cells)} |"


def _short(value: float) -> str:
    """Returns a number with four digits and a unit: M, G (10^9) or T."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:,.0f}"
