"""All published models in a folder of configs, counted and held to what is printed of them."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from moe_jax.config.experiment import Experiment
from moe_jax.config.schema import build
from moe_jax.counting.claims import Claim, record
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
class Published:
    """One config file.

    Attributes:
        name: of the file, without ``.py``.
        config: what it returns.
        claims: the printed numbers.
    """

    name: str
    config: ConfigDict
    claims: tuple[Claim, ...]

    def experiment(self) -> Experiment:
        """Returns the typed configuration."""
        return build(Experiment, self.config)

    def record(self) -> dict[str, Any]:
        """Counts the model."""
        experiment = self.experiment()
        return record(experiment.model, experiment.vocab_size, experiment.sequence)


def load(path: Path) -> Published:
    """Returns one config file.

    Raises:
        ConfigError: if it has no ``get_config`` or no ``PUBLISHED``.
    """
    spec = importlib.util.spec_from_file_location(path.stem.replace(".", "_"), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("get_config", "PUBLISHED"):
        if not hasattr(module, name):
            raise ConfigError(f"{path} has no {name}: a published model needs both")
    return Published(path.stem, module.get_config(), module.PUBLISHED)


def load_all(folder: Path) -> Iterator[Published]:
    """Yields every config file of a folder in order.

    Raises:
        ConfigError: if there is none.
    """
    paths = sorted(path for path in folder.glob("*.py") if path.stem != "__init__")
    if not paths:
        raise ConfigError(f"{folder} has no config files: leave --folder out")
    yield from map(load, paths)


def table(folder: Path) -> str:
    """Returns the table of all models, as Markdown."""
    rows = [row for published in load_all(folder) for row in _rows(published)]
    return _HEADER + "\n".join(rows) + "\n"


def _rows(published: Published) -> Iterator[str]:
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
    """Four digits and a unit: M, G (10^9) or T."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:,.0f}"
