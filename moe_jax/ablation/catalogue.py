"""All ablations, and the results that are committed of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moe_jax import experiments
from moe_jax.ablation.ablation import Ablation
from moe_jax.ablation.runner import run_of
from moe_jax.config.library import module_of, short_name
from moe_jax.errors import ConfigError

HERE = Path(experiments.__file__).resolve().parent
RESULTS = HERE / "results"
LINES = "results.jsonl"
_MARK = "ABLATION = "


@dataclasses.dataclass(frozen=True)
class Entry:
    """An ablation and where it is defined.

    Attributes:
        file: relative to the repository.
        ablation: the ablation.
    """

    file: Path
    ablation: Ablation


@dataclasses.dataclass(frozen=True)
class Result:
    """What one command left in a folder.

    Attributes:
        entry: the ablation.
        folder: relative to the folder of all results.
        records: lines of ``results.jsonl``.
    """

    entry: Entry
    folder: Path
    records: list[dict[str, Any]]

    @property
    def scale(self) -> str:
        """The scale of the runs."""
        return self.records[0]["scale"]

    @property
    def command(self) -> str:
        """What makes these results, from the repository's root."""
        output = f"experiments/results/{self.folder.as_posix()}"
        return command_of(self.entry.file, self.entry.ablation, self.records, output)

    @property
    def outdated(self) -> bool:
        """Whether the command of today would train something else."""
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
        ConfigError: if there is no such file, if it fails, or has nothing of this name in it.
    """
    if not file.is_file():
        raise ConfigError(f"--ablation={file} is not a file; try switch/capacity_factor")
    module = module_of(file, "--ablation")
    if not isinstance(getattr(module, "ABLATION", None), Ablation):
        raise ConfigError(f"{file} defines no ABLATION, as the files of moe_jax.experiments do")
    return module.ABLATION


def entries(root: Path = HERE) -> list[Entry]:
    """Returns the ablations of ``root/*/*.py``, by file."""
    files = [path for path in sorted(root.glob("*/*.py")) if _MARK in path.read_text()]
    return [Entry(path.relative_to(root.parent), load(path)) for path in files]


def results(found: Iterable[Entry], folder: Path = RESULTS) -> list[Result]:
    """Returns what lies in ``folder/NAME``, and then below it, in the order of the ablations."""
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
    """Returns the command that makes these records.

    Args:
        file: of the ablation.
        ablation: the ablation.
        records: of all its arms and seeds, or of some.
        output: the folder of the report; none for the default.
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
