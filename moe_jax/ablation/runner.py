"""The runs of an ablation: their folders, and the processes that train them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_jax.ablation.ablation import Ablation, Changed, Finished
from moe_jax.config.experiment import Experiment
from moe_jax.counting import Cost, count
from moe_jax.run.shares import shares_of
from moe_jax.run.side_by_side import Place, RunFiles, Task, side_by_side

# These settings do not change the computation of a run.
_FREE = ("mesh", "name")
_COMPILED = "compiled"


@dataclasses.dataclass(frozen=True)
class Run(RunFiles):
    """One arm with one seed.

    Attributes:
        arm: Name of the arm.
        seed: Seed of data order and weights.
        argument: Argument with which the file of the ablation returns the configuration.
        experiment: Configuration of the run.
        folder: Working directory, named by a hash of the configuration.
        needs: Runs of other arms, changed or not, that must be there first, by the setting that
            names their folder.
    """

    arm: str
    seed: int
    argument: str
    experiment: Experiment
    folder: Path
    needs: Mapping[str, Run | ChangedRun] = dataclasses.field(default_factory=dict)

    @property
    def scale(self) -> str:
        """Scale of sizes and budgets."""
        return self.argument.split(",")[1]

    @property
    def possible(self) -> bool:
        """Whether none of the runs that it needs has diverged."""
        return not any(need.diverged or not need.possible for need in self.needs.values())

    @property
    def cost(self) -> Cost:
        """Parameters and FLOPs of the model."""
        return count(self.experiment.model, self.experiment.vocab_size, self.experiment.sequence)

    @property
    def tokens(self) -> int:
        """Number of training tokens, if the run does not diverge."""
        return self.experiment.tokens_per_step * self.experiment.training.steps

    @property
    def training_flops(self) -> int:
        """FLOPs of all training tokens, with the FLOPs of the teacher."""
        teacher = self.needs.get("training.teacher")
        per_token = self.cost.training_flops_per_token
        if isinstance(teacher, Run):
            per_token += teacher.cost.flops_per_token
        return per_token * self.tokens

    def task(self, file: Path) -> Task:
        """Returns the training of the run, whose arm ``file`` defines."""
        needs = (f"--config.{setting}={need.folder}" for setting, need in self.needs.items())
        steps = f"--config.training.steps={self.experiment.training.steps}"
        return Task(
            name=f"arm {self.arm}, seed {self.seed}",
            arguments=(f"--config={file}:{self.argument}", steps, *needs),
            folder=self.folder,
            compiled=self.folder.parent / _COMPILED,
            scale=self.scale,
        )

    def make(self, file: Path, place: Place) -> None:
        """Trains the run, whose arm ``file`` defines, on a share of the machine."""
        place.train(self.task(file))


@dataclasses.dataclass(frozen=True)
class ChangedRun:
    """A folder that a command writes from a finished run, such as a run with fewer experts.

    Attributes:
        source: The finished run.
        change: The command.
        folder: Folder to write, named by a hash of the source and the command.
    """

    source: Run
    change: Changed
    folder: Path

    @property
    def needs(self) -> Mapping[str, Run]:
        """The finished run."""
        return {"input": self.source}

    @property
    def ended(self) -> bool:
        """Whether the folder is written; an interrupted command leaves none."""
        return self.folder.exists()

    @property
    def diverged(self) -> bool:
        """A change trains nothing."""
        return False

    @property
    def possible(self) -> bool:
        """Whether the source can be trained."""
        return self.source.possible and not self.source.diverged

    @property
    def training_flops(self) -> int:
        """A change trains nothing."""
        return 0

    def make(self, file: Path, place: Place) -> None:
        """Writes the folder on a share of the machine."""
        del file
        folders = (f"--input={self.source.folder}", f"--output={self.folder}")
        arguments = (self.change.command, *folders, *self.change.flags)
        place.change(str(self.change), arguments, self.folder, self.source.scale)


def runs_of(
    ablation: Ablation, scale: str, seeds: int, arms: Iterable[str], workdir: Path, steps: int = 0
) -> list[Run]:
    """Returns all runs, seed by seed, so that the first runs already compare all arms.

    Args:
        ablation: Ablation of the runs.
        scale: Scale of the runs.
        seeds: Number of seeds.
        arms: Names of the arms.
        workdir: Folder of the runs of all ablations.
        steps: Training steps; 0 for the steps of the scale.
    """
    arms = list(arms)
    return [
        run_of(ablation, scale, ablation.first_seed + number, arm, workdir, steps)
        for number in range(seeds)
        for arm in arms
    ]


def run_of(
    ablation: Ablation, scale: str, seed: int, arm: str, workdir: Path, steps: int = 0
) -> Run:
    """Returns one run; see ``runs_of`` for the arguments."""
    experiment = ablation.experiment(arm, scale, seed)
    if steps:
        experiment = _with(experiment, {"training.steps": steps})
    needs = {
        setting: _needed(other, run_of(ablation, scale, seed, other.arm, workdir, steps))
        for setting, other in ablation.finished(arm).items()
    }
    # The hash identifies the other run by its configuration, so all runs can be moved together.
    named = _with(experiment, {setting: need.folder.name for setting, need in needs.items()})
    folders = {setting: str(need.folder) for setting, need in needs.items()}
    argument, folder = f"{arm},{scale},{seed}", workdir / "runs" / fingerprint(named)
    return Run(arm, seed, argument, _with(experiment, folders), folder, needs)


def _needed(setting: Finished, run: Run) -> Run | ChangedRun:
    """Returns the run whose folder a setting names."""
    if not isinstance(setting, Changed):
        return run
    text = json.dumps([run.folder.name, setting.command, *setting.flags])
    return ChangedRun(run, setting, run.folder.with_name(_hash(text)))


def _with(experiment: Experiment, settings: Mapping[str, Any]) -> Experiment:
    """Returns the experiment with new settings, given by dotted names."""
    for name, value in settings.items():
        part, _, key = name.rpartition(".")
        changed = dataclasses.replace(getattr(experiment, part), **{key: value})
        experiment = dataclasses.replace(experiment, **{part: changed})
    return experiment


def to_train(runs: Iterable[Run | ChangedRun]) -> list[Run | ChangedRun]:
    """Returns the runs to train or to write, each once, every run after the runs that it needs."""
    missing: dict[Path, Run | ChangedRun] = {}
    for run in runs:
        if not run.ended:
            missing |= {need.folder: need for need in to_train(run.needs.values())}
            missing[run.folder] = run
    return list(missing.values())


def fingerprint(experiment: Experiment) -> str:
    """Returns a hash of all settings that change the computation of a run.

    The hash leaves settings at their default out, so a new setting does not outdate old results.
    """
    chosen = {key: value for key, value in _chosen(experiment).items() if key not in _FREE}
    return _hash(json.dumps(chosen, sort_keys=True))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _chosen(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_chosen(item) for item in value]
    if isinstance(value, str):
        # Paths of package files must not depend on where the package is installed.
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


def execute(runs: Sequence[Run | ChangedRun], file: Path, places: int) -> None:
    """Trains all runs that have not ended; a killed run continues from its checkpoint.

    The runs that a run needs come first; if one of them diverges, the run is skipped.

    Args:
        runs: Runs of one ablation; equal runs are trained once.
        file: File of the ablation.
        places: Number of simultaneous runs; each has a share of the cores and GPUs.

    Raises:
        TrainingError: A run fails other than by divergence; the message holds its last log line.
        Interrupted: The user pressed Ctrl-C or sent SIGTERM; the active runs have saved a step.
    """
    needed = [need for run in runs if not run.ended for need in run.needs.values()]
    if needed:
        execute(needed, file, places)
    missing = {run.folder: run for run in runs if not run.ended and run.possible}
    side_by_side(
        list(missing.values()),
        shares_of(places),
        lambda run, place: run.make(file, place),
    )
