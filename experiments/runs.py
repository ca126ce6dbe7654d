"""The runs of an ablation: where each is kept, how it is started, and what is read off it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import queue
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.ablation import Ablation
from experiments.places import Place, graphics_cards
from moe_jax.experiment import Experiment
from moe_jax.planning import Cost, count
from moe_jax.training.loop import TrainingError
from moe_jax.training.metrics import read_metrics
from moe_jax.workdir import RESULT, locked

_LOG = "log.txt"
# Neither changes what a run computes.
_FREE = ("mesh", "name")
_COMPILED = "compiled"
_POINTS = 100


@dataclasses.dataclass(frozen=True)
class Run:
    """One arm with one seed.

    Attributes:
        arm: its name.
        seed: of data order and weights.
        argument: what makes the ablation's file return its configuration.
        experiment: the configuration.
        folder: its workdir, named by a hash of the configuration.
        needs: runs of other arms that must be finished before it, by the setting that names them.
    """

    arm: str
    seed: int
    argument: str
    experiment: Experiment
    folder: Path
    needs: Mapping[str, Run] = dataclasses.field(default_factory=dict)

    @property
    def scale(self) -> str:
        """Of sizes and budgets."""
        return self.argument.split(",")[1]

    @property
    def finished(self) -> bool:
        """Whether its result is there."""
        return (self.folder / RESULT).exists()

    @property
    def result(self) -> dict[str, Any]:
        """What the run wrote when it finished."""
        return json.loads((self.folder / RESULT).read_text())

    @property
    def lines(self) -> list[dict[str, Any]]:
        """What it logged in training."""
        return [line for line in read_metrics(self.folder) if line["kind"] == "train"]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Its evaluations, on the way and at its end."""
        return [line for line in read_metrics(self.folder) if line["kind"] == "eval"]

    @property
    def training_flops(self) -> int:
        """Of the whole run, its teacher's included."""
        experiment, teacher = self.experiment, self.needs.get("training.teacher")
        per_token = _cost(experiment).training_flops_per_token
        if teacher:
            per_token += _cost(teacher.experiment).flops_per_token
        return per_token * experiment.tokens_per_step * experiment.training.steps


def _cost(experiment: Experiment) -> Cost:
    return count(experiment.model, experiment.vocab_size, experiment.sequence)


def runs_of(
    ablation: Ablation, scale: str, seeds: int, arms: Iterable[str], workdir: Path, steps: int = 0
) -> list[Run]:
    """Returns all runs, seed by seed, so that a part of them has whole comparisons.

    Args:
        ablation: the ablation.
        scale: one of its scales.
        seeds: how many.
        arms: by name.
        workdir: where runs are kept, for all ablations.
        steps: of training, instead of the scale's; 0 for those.
    """
    arms = list(arms)
    return [
        run_of(ablation, scale, seed, arm, workdir, steps) for seed in range(seeds) for arm in arms
    ]


def run_of(
    ablation: Ablation, scale: str, seed: int, arm: str, workdir: Path, steps: int = 0
) -> Run:
    """Returns one run; the arguments are those of ``runs_of``."""
    experiment = ablation.experiment(arm, scale, seed)
    if steps:
        experiment = _with(experiment, {"training.steps": steps})
    needs = {
        setting: run_of(ablation, scale, seed, other, workdir, steps)
        for setting, other in ablation.finished(arm).items()
    }
    # What the other run computes and not where it is, so that all of them can be moved.
    named = _with(experiment, {setting: need.folder.name for setting, need in needs.items()})
    folders = {setting: str(need.folder) for setting, need in needs.items()}
    argument, folder = f"{arm},{scale},{seed}", workdir / "runs" / fingerprint(named)
    return Run(arm, seed, argument, _with(experiment, folders), folder, needs)


def _with(experiment: Experiment, settings: Mapping[str, Any]) -> Experiment:
    """The experiment with settings by dotted names."""
    for name, value in settings.items():
        part, _, key = name.rpartition(".")
        changed = dataclasses.replace(getattr(experiment, part), **{key: value})
        experiment = dataclasses.replace(experiment, **{part: changed})
    return experiment


def to_train(runs: Iterable[Run]) -> list[Run]:
    """Returns what is not finished of runs and of those that they need, each once, in order."""
    found: dict[Path, Run] = {}
    for run in runs:
        if not run.finished:
            found |= {need.folder: need for need in to_train(run.needs.values())}
            found[run.folder] = run
    return list(found.values())


def fingerprint(experiment: Experiment) -> str:
    """Returns a hash of everything in a configuration that changes what a run computes.

    Settings at their default are left out, so that results outlive new settings.
    """
    chosen = {key: value for key, value in _chosen(experiment).items() if key not in _FREE}
    text = json.dumps(chosen, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _chosen(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_chosen(item) for item in value]
    if isinstance(value, str):
        # Texts that a package brings are the same wherever it is installed.
        return value.replace(sysconfig.get_path("purelib"), "site-packages")
    if not dataclasses.is_dataclass(value):
        return value
    set_ = {
        field.name: _chosen(getattr(value, field.name))
        for field in dataclasses.fields(value)
        if getattr(value, field.name) != _default(field)
    }
    return {"type": type(value).__name__, **set_}


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def execute(runs: Sequence[Run], file: Path, side_by_side: int) -> None:
    """Trains what is not finished; a run that was killed goes on from its checkpoint.

    What runs need is trained before them.

    Args:
        runs: of one ablation; equal ones are trained once.
        file: the ablation's.
        side_by_side: how many at a time, each with its share of the cores and of graphics cards.

    Raises:
        TrainingError: if a run fails; its message is the run's last line.
    """
    needed = [need for run in runs if not run.finished for need in run.needs.values()]
    if needed:
        execute(needed, file, side_by_side)
    missing = {run.folder: run for run in runs if not run.finished}.values()
    cards = graphics_cards()
    places: queue.Queue[Place] = queue.Queue()
    for index in range(side_by_side):
        places.put(Place(index, side_by_side, cards))

    def one(run: Run) -> None:
        place = places.get()
        try:
            _train(run, file, place)
        finally:
            places.put(place)

    with ThreadPoolExecutor(side_by_side) as pool, tqdm(total=len(missing), unit="run") as bar:
        for _ in pool.map(one, missing):
            bar.update()


def _train(run: Run, file: Path, place: Place) -> None:
    with locked(run.folder, wait=True):
        # What a killed runner started trains on by itself.
        if run.finished:
            return
    command = [sys.executable, "-m", "moe_jax.train", f"--config={file}:{run.argument}"]
    command.append(f"--config.training.steps={run.experiment.training.steps}")
    command += [f"--config.{setting}={need.folder}" for setting, need in run.needs.items()]
    compiled = {
        "JAX_COMPILATION_CACHE_DIR": str((run.folder.parent / _COMPILED).absolute()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    with (run.folder / _LOG).open("a") as log:
        done = subprocess.run(
            [*command, f"--workdir={run.folder}"],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | compiled | place.take(run.scale),
        )
    if done.returncode or not run.finished:
        last = (run.folder / _LOG).read_text().strip().splitlines()[-1:]
        raise TrainingError(
            f"arm {run.arm}, seed {run.seed} ended without a result ({' '.join(last)}); the rest "
            f"is in {run.folder / _LOG}"
        )


def _late(run: Run, read: Callable[[dict[str, Any]], float]) -> float:
    """Mean over the second half of training."""
    lines = run.lines
    return float(np.mean([read(line) for line in lines[len(lines) // 2 :]]))


def _over_layers(name: str) -> Callable[[Run], float | None]:
    """Mean over MoE layers, over the second half of training; none for a dense model."""

    def read(run: Run) -> float | None:
        if not run.result["layers"]:
            return None
        return _late(run, lambda line: float(np.mean([layer[name] for layer in line["layers"]])))

    return read


def _eval_violation(run: Run) -> float | None:
    layers = run.result["layers"]
    return float(np.mean([layer["max_violation"] for layer in layers])) if layers else None


def _of_domains(name: str) -> Callable[[Run], float | None]:
    """Mean over MoE layers of a score on text of known domains; none of other text."""

    def read(run: Run) -> float | None:
        layers = run.result.get("specialisation", {}).get("layers")
        return float(np.mean([layer[name] for layer in layers])) if layers else None

    return read


def _speed(run: Run) -> float:
    # The first line's time has compilation in it.
    return float(np.median([line["tokens_per_second"] for line in run.lines[1:] or run.lines]))


def _excess_loss(run: Run) -> float | None:
    best = run.result.get("best_possible_loss")
    return None if best is None else run.result["loss"] - best


# None where a run has no such thing.
METRICS: dict[str, Callable[[Run], float | None]] = {
    "loss": lambda run: run.result["loss"],
    "best_loss": lambda run: min(line["loss"] for line in run.evaluations),
    "bits_per_byte": lambda run: run.result["bits_per_byte"],
    "train_loss": lambda run: _late(run, lambda line: line["loss"]),
    "dropped": lambda run: _late(run, lambda line: line["dropped_fraction"]),
    "eval_dropped": lambda run: run.result["dropped_fraction"],
    "mutual_information": _of_domains("mutual_information"),
    "purity": _of_domains("purity"),
    "excess_loss": _excess_loss,
    "max_violation": _over_layers("max_violation"),
    "eval_violation": _eval_violation,
    "load_entropy": _over_layers("load_entropy"),
    "tokens_per_second": _speed,
    "step_seconds": lambda run: run.experiment.tokens_per_step / _speed(run),
}


def record(run: Run) -> dict[str, Any]:
    """Returns the line of ``results.jsonl`` for a finished run."""
    result, lines = run.result, run.lines
    return {
        "arm": run.arm,
        "seed": run.seed,
        "scale": run.scale,
        "config": run.folder.name,
        "parameters": result["total_parameters"],
        "flops_per_token": result["flops_per_token"],
        "training_flops": run.training_flops,
        "steps": result["steps"],
        "tokens": result["tokens"],
        "seconds": result["seconds"],
        "device": result["device"],
        **{name: value for name, read in METRICS.items() if (value := read(run)) is not None},
        # What share of validation's slots each expert takes, by MoE layer.
        "load": [[round(share, 5) for share in layer["load"]] for layer in result["layers"]],
        "curve": _curve(lines),
    }


def _curve(lines: Sequence[dict[str, Any]]) -> list[list[float]]:
    """Returns training loss by step, each the mean since the one before; few enough to commit."""
    width = max(len(lines) // _POINTS, 1)
    parts = [lines[start : start + width] for start in range(0, len(lines), width)]
    losses = [float(np.mean([line["loss"] for line in part])) for part in parts]
    return [[part[-1]["step"], loss] for part, loss in zip(parts, losses, strict=True)]
