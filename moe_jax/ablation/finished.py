"""Records of an earlier command, which save the training of their runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moe_jax import data
from moe_jax.ablation.ablation import Ablation
from moe_jax.ablation.catalogue import LINES, RESULTS, read
from moe_jax.ablation.runner import Run, run_of
from moe_jax.errors import ConfigError

COMMITTED = "committed"

# Records by arm and seed.
Finished = Mapping[tuple[str, int], dict[str, Any]]


def finished_runs(source: str | Path, ablation: Ablation, scale: str, steps: int) -> Finished:
    """Returns the records of an earlier command by arm and seed.

    Args:
        source: A ``results.jsonl``, its folder, or ``committed`` for the records of the package.
        ablation: Ablation of the records.
        scale: Scale of the runs.
        steps: Training steps; 0 for the steps of the scale.

    Raises:
        ConfigError: The file is missing or no ``results.jsonl``, or a record has another
            configuration than its arm has now.
    """
    path = RESULTS / ablation.name if source == COMMITTED else Path(source)
    path = path / LINES if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"--records={source}: {path} is not a file; omit --records to train all")
    try:
        found = {(line["arm"], line["seed"]): line for line in read(path)}
        outdated = [key for key, line in found.items() if _outdated(line, ablation, scale, steps)]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"--records={source}: {path} is no {LINES} of an ablation") from error
    if outdated:
        arm, seed = outdated[0]
        raise ConfigError(
            f"--records={source}: arm {arm}, seed {seed} has another configuration now at "
            f"--scale={scale}; omit --records to train all"
        )
    return found


def _outdated(line: Mapping[str, Any], ablation: Ablation, scale: str, steps: int) -> bool:
    """Returns whether a record has another configuration than its arm has now."""
    if line["scale"] != scale or line["arm"] not in ablation.arms:
        return True
    run = run_of(ablation, scale, line["seed"], line["arm"], Path(), steps)
    return line["config"] != run.folder.name


def check_corpora(runs: Iterable[Run], finished: Finished) -> None:
    """Checks that the corpus of every run to train is the one of the records of its arm.

    Args:
        runs: Runs to train.
        finished: Records of the same ablation.

    Raises:
        ConfigError: The corpora differ; for example, the library of another Python has other text.
    """
    recorded = {line["arm"]: line for line in finished.values() if "corpus" in line}
    arms = {run.arm: run.experiment.data for run in runs if run.arm in recorded}
    hashes = {config: data.read_contents(config).sha256 for config in set(arms.values())}
    for arm, config in arms.items():
        here, there = hashes[config], recorded[arm]["corpus"]
        if here != there:
            python = recorded[arm]["versions"]["python"]
            raise ConfigError(
                f"the corpus of arm {arm} has the SHA-256 {here[:12]} and in --records "
                f"{there[:12]} (Python {python}); omit --records to train all"
            )
