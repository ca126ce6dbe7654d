"""Samplers of Optuna, which draw points from the results of earlier trials."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_jax.errors import ConfigError
from moe_jax.sweeps.axes import Axis, Point
from moe_jax.sweeps.plan import METRICS

JOURNAL = "optuna.log"
_STUDY, _METRIC = "sweep", "metric"
# Class of each sampler in ``optuna.samplers``, and the package that it needs besides.
_CLASSES = {"random": "RandomSampler", "tpe": "TPESampler", "cmaes": "CmaEsSampler"}
NAMES = ("grid", *_CLASSES)


def check_sampler(name: str, trials: int) -> None:
    """Rejects a sampler that cannot run, and a number of trials that does not fit.

    Raises:
        ConfigError: If so; the message names the remedy.
    """
    if name == "grid":
        if trials:
            raise ConfigError("--trials has an effect only with a sampler: add --sampler=tpe")
        return
    if trials < 1:
        raise ConfigError(f"--sampler={name} needs a number of runs: add --trials=20")
    packages = ["optuna", *(["cmaes"] if name == "cmaes" else [])]
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"--sampler={name} needs the package {package}: pip install 'moe_jax[sweep]'"
            )


class OptunaStudy:
    """The trials of a sweep in the order in which a sampler drew them.

    The file holds every trial, so a killed sweep continues. The sampler of each trial has a seed of
    its own: with one run at a time, a sweep with and without a stop draws the same points.
    """

    def __init__(self, folder: Path, axes: Sequence[Axis], sampler: str, metric: str):
        """Opens the study, and creates it if the folder has none.

        The points of failed trials are drawn again before new ones.

        Args:
            folder: Folder of the sweep.
            axes: Settings to change; a list of values is drawn as a category.
            sampler: Name of the sampler.
            metric: Name of the metric in ``METRICS``.

        Raises:
            ConfigError: If the folder holds a study of other settings or of another metric.
        """
        import optuna
        from optuna.storages import journal

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        maximize = METRICS[metric]
        backend = journal.JournalFileBackend(str(folder / JOURNAL))
        self._study = optuna.create_study(
            storage=optuna.storages.JournalStorage(backend),
            study_name=_STUDY,
            direction="maximize" if maximize else "minimize",
            load_if_exists=True,
        )
        self._axes, self._class = axes, getattr(optuna.samplers, _CLASSES[sampler])
        self._distributions = {axis.name: _distribution(axis) for axis in axes}
        self._states, self._worst = optuna.trial.TrialState, float("-inf" if maximize else "inf")
        _check_owner(self._study, folder, sorted(self._distributions), metric)
        self._enqueue_failed()

    def _enqueue_failed(self) -> None:
        """Lets the next calls of ``ask`` draw the points of failed trials that nothing repeats."""
        trials = self._study.get_trials(deepcopy=False)
        repeated = [trial.params for trial in trials if trial.state != self._states.FAIL]
        repeated += [trial.system_attrs.get("fixed_params", {}) for trial in trials]
        for trial in trials:
            if trial.state == self._states.FAIL and trial.params not in repeated:
                self._study.enqueue_trial(trial.params)
                repeated.append(trial.params)

    @property
    def points(self) -> dict[int, Point]:
        """Point of every trial so far that has not failed, by its number."""
        states = (self._states.RUNNING, self._states.COMPLETE)
        trials = self._study.get_trials(deepcopy=False, states=states)
        drawn = {trial.number: trial.params for trial in trials}
        whole = {number: found for number, found in drawn.items() if len(found) == len(self._axes)}
        return {number: self._point(found) for number, found in whole.items()}

    @property
    def open(self) -> list[int]:
        """Numbers of the trials without a result, which a killed sweep left."""
        trials = self._study.get_trials(deepcopy=False, states=(self._states.RUNNING,))
        return [trial.number for trial in trials if trial.number in self.points]

    def ask(self) -> tuple[int, Point]:
        """Draws the next point; returns its number and the point."""
        self._study.sampler = self._class(seed=len(self._study.get_trials(deepcopy=False)))
        trial = self._study.ask(self._distributions)
        return trial.number, self._point(trial.params)

    def tell(self, number: int, value: float | None, *, diverged: bool = False) -> None:
        """Notes the result of a trial: its value, its divergence, or neither for a failed run."""
        if diverged:
            value = self._worst
        state = self._states.FAIL if value is None else self._states.COMPLETE
        self._study.tell(number, value, state=state)

    def _point(self, params: Mapping[str, Any]) -> Point:
        return {axis.name: str(params[axis.name]) for axis in self._axes}


def _check_owner(study: Any, folder: Path, names: Sequence[str], metric: str) -> None:
    """Checks that the trials of a study have these settings, and records the metric.

    Raises:
        ConfigError: If the settings or the recorded metric differ.
    """
    for trial in study.get_trials(deepcopy=False):
        if trial.params and sorted(trial.params) != list(names):
            theirs, ours = ", ".join(sorted(trial.params)), ", ".join(names)
            raise ConfigError(
                f"{folder} holds a sweep over {theirs}, and not over {ours}: use another --workdir"
            )
    known = study.user_attrs.get(_METRIC, metric)
    if known != metric:
        raise ConfigError(
            f"{folder} holds a sweep with --metric={known}, and not {metric}: use another --workdir"
        )
    study.set_user_attr(_METRIC, metric)


def _distribution(axis: Axis) -> Any:
    from optuna import distributions

    if not axis.is_range:
        return distributions.CategoricalDistribution(axis.texts)
    low, high = axis.texts
    if axis.whole:
        return distributions.IntDistribution(int(low), int(high), log=axis.log)
    return distributions.FloatDistribution(float(low), float(high), log=axis.log)
