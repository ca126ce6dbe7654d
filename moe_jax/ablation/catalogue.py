"""All ablations and their committed results."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moe_jax.ablation.ablation import Ablation
from moe_jax.ablation.runner import run_of
from moe_jax.config.library import EXPERIMENTS, module_of, short_name
from moe_jax.errors import ConfigError

RESULTS = EXPERIMENTS / "results"
LINES = "results.jsonl"
_MARK = "ABLATION = "


@dataclasses.dataclass(frozen=True)
class CatalogueEntry:
    """An ablation and its file.

    Attributes:
        file: Path of the file, relative to the repository.
        ablation: Ablation that the file defines.
    """

    file: Path
    ablation: Ablation


@dataclasses.dataclass(frozen=True)
class Result:
    """The committed records of one command.

    Attributes:
        entry: Ablation and its file.
        folder: Folder of the records, relative to the folder of all results.
        records: Lines of ``results.jsonl``.
    """

    entry: CatalogueEntry
    folder: Path
    records: list[dict[str, Any]]

    @property
    def scale(self) -> str:
        """Scale of the runs."""
        return self.records[0]["scale"]

    @property
    def command(self) -> str:
        """Command that reproduces the records, from the root of the repository."""
        output = f"experiments/results/{self.folder.as_posix()}"
        return command_of(self.entry.file, self.entry.ablation, self.records, output)

    @property
    def outdated(self) -> bool:
        """Whether the command would now train another configuration."""
        ablation, scale = self.entry.ablation, self.scale
        return any(
            line["arm"] not in ablation.arms
            or line["config"]
            != run_of(ablation, scale, line["seed"], line["arm"], Path()).folder.name
            for line in self.records
        )


def load(file: Path) -> Ablation:
    """Returns the ``ABLATION`` of a file.

    Raises:
        ConfigError: The file is missing, fails, or defines no ``ABLATION``.
    """
    if not file.is_file():
        raise ConfigError(f"--ablation={file} is not a file; try switch/capacity_factor")
    module = module_of(file, "--ablation")
    if not isinstance(getattr(module, "ABLATION", None), Ablation):
        raise ConfigError(f"{file} defines no ABLATION, as the files of moe_jax.experiments do")
    return module.ABLATION


def entries(root: Path = EXPERIMENTS) -> list[CatalogueEntry]:
    """Returns the ablations of ``root/*/*.py``, in the order of their files."""
    files = [path for path in sorted(root.glob("*/*.py")) if _MARK in path.read_text()]
    return [CatalogueEntry(path.relative_to(root.parent), load(path)) for path in files]


def results(found: Iterable[CatalogueEntry], folder: Path = RESULTS) -> list[Result]:
    """Returns the results in ``folder/NAME`` and its subfolders, in the order of the ablations."""
    return [
        Result(entry, path.parent.relative_to(folder), records)
        for entry in found
        for path in sorted((folder / entry.ablation.name).glob(f"**/{LINES}"), key=_depth)
        if (records := read(path))
    ]


def _depth(path: Path) -> tuple[int, Path]:
    return len(path.parts), path


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a ``results.jsonl``."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def command_of(
    file: Path, ablation: Ablation, records: Iterable[dict[str, Any]], output: str | None
) -> str:
    """Returns the command that reproduces records.

    Args:
        file: File of the ablation.
        ablation: Ablation of the records.
        records: Records of all arms and seeds, or of some.
        output: Folder of the report; ``None`` for the default.
    """
    lines = list(records)
    arms = [arm for arm in ablation.arms if any(line["arm"] == arm for line in lines)]
    seeds = len({line["seed"] for line in lines})
    words = ["moe-jax ablate", f"--ablation={short_name(file)}", f"--scale={lines[0]['scale']}"]
    words += [f"--seeds={seeds}"] if seeds != ablation.seeds else []
    words += [f"--arms={','.join(arms)}"] if len(arms) < len(ablation.arms) else []
    first = lines[0]
    planned = ablation.experiment(first["arm"], first["scale"], first["seed"]).training.steps
    words += [f"--steps={first['steps']}"] if first["steps"] != planned else []
    words += [f"--output={output}"] if output else []
    return " ".join(words)
