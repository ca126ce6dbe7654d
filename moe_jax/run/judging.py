"""Judges the evaluation of a run by its alarms, and says what has drifted: data or routing."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from moe_jax import data
from moe_jax.analysis.drift_kinds import distances, drifted, with_kinds
from moe_jax.analysis.observed import Observed, observe
from moe_jax.config.experiment import Experiment
from moe_jax.models import Model
from moe_jax.models.adapters import merged
from moe_jax.monitor import ALARMS, Drift, on_stream
from moe_jax.monitor.watch import names_of
from moe_jax.routing import SoftSlots
from moe_jax.run import workdir
from moe_jax.run.alarms import lines_to_compare
from moe_jax.run.corpus import read
from moe_jax.run.opened import FolderModel, open_folder
from moe_jax.run.session import Session
from moe_jax.training.state import TrainState
from moe_jax.training.step_folders import latest_step

_DOCUMENTS, _BATCH = 64, 8


def judged(
    session: Session, state: TrainState, folder: Path, step: int, means: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns an evaluation with the conditions of the run's alarms on the evaluated stream.

    A rule of drift without a reference compares with the run's last validation up to ``step``. A
    run without alarms gets its evaluation as it is. The kind of a drift follows from two streams of
    at most 64 validation documents per part of the data: those of the reference through its model,
    and the evaluated ones through this model. It stays unknown with several processes, with soft
    slots, and where the reference has another tokenizer.

    Args:
        session: Experiment of the evaluation.
        state: Weights of the run.
        folder: Workdir of the run.
        step: Step of the checkpoint.
        means: Result of the evaluation.

    Returns:
        The means, with ``alarms``, ``active_alarms`` and, if there is a rule of drift, ``drift``:
        the distances from each reference, by its workdir.

    Raises:
        ConfigError: If a reference cannot be read; see ``moe_jax.run.alarms.references``.
    """
    experiment = session.experiment
    alarms = experiment.training.alarms
    if not alarms:
        return dict(means)
    found = on_stream(alarms, means, lines_to_compare(experiment, folder, step))
    named = dict(zip(names_of(alarms), alarms, strict=True))
    rules = {name: alarm for name, alarm in named.items() if isinstance(alarm, Drift)}
    record = dict(means)
    if rules:
        model = merged(nnx.merge(session.graph, state.params, state.router_state))
        compared = _Compared(experiment, folder, _opened(session, model))
        between = {rule.reference: compared.distances(rule.reference) for rule in rules.values()}
        record["drift"] = _named(between, min(rule.above for rule in rules.values()))
        for name, rule in rules.items():
            found[name] = _in_kinds(rule, found.get(name, {}), between[rule.reference])
    found = {name: layers for name, layers in found.items() if layers}
    return {**record, ALARMS: found, "active_alarms": sum(map(len, found.values()))}


@dataclasses.dataclass(frozen=True)
class _Compared:
    """An evaluated stream that is compared with the validation documents of runs.

    Attributes:
        experiment: Experiment of the evaluation.
        folder: Workdir of the run.
        opened: Model of the evaluation.
    """

    experiment: Experiment
    folder: Path
    opened: FolderModel

    def distances(self, reference: str) -> dict[str, Any] | None:
        """Returns the distances from a reference; ``None`` if the kind of a drift is unknown.

        Args:
            reference: Workdir of a run; "" for the validation documents of this run.
        """
        selects = (layer.moe.router.select for layer in self.experiment.model.sparse_layers())
        if jax.process_count() > 1 or any(isinstance(select, SoftSlots) for select in selects):
            return None
        folder = Path(reference) if reference else self.folder
        opened = self._reference(reference)
        own = workdir.load(folder).data
        if opened is None or not _same_ids(opened, self.opened, own):
            return None
        return distances(_observed(opened, own), self._evaluated)

    def _reference(self, reference: str) -> FolderModel | None:
        if not reference:
            return self.opened
        if latest_step(Path(reference) / workdir.CHECKPOINTS) is None:
            return None
        return open_folder(reference, None, lambda model: None)

    @functools.cached_property
    def _evaluated(self) -> tuple[Observed, ...]:
        return _observed(self.opened, self.experiment.data)


def _opened(session: Session, model: Model) -> FolderModel:
    tokenizer, length = session.tokenizer, session.experiment.data.seq_length
    size, start = tokenizer.vocab_size, tokenizer.pad_id
    return FolderModel(model, tokenizer, length, size, start, session.mesh)


def _observed(opened: FolderModel, config: data.DataConfig) -> tuple[Observed, ...]:
    """Returns the first validation documents of each part of the data, in each stack."""
    groups = [data.texts(part, "eval") for part in config.parts.values()]
    texts, _, _ = read(opened, groups, _DOCUMENTS, config.seq_length)
    with opened.on_mesh():
        return observe(opened.model, texts, _BATCH)


def _same_ids(one: FolderModel, other: FolderModel, config: data.DataConfig) -> bool:
    """Returns whether two tokenizers agree on the first validation document of the data."""
    text = data.texts(next(iter(config.parts.values())), "eval")[0]
    assert one.tokenizer is not None and other.tokenizer is not None  # Runs have tokenizers.
    return np.array_equal(one.tokenizer.encode(text), other.tokenizer.encode(text))


def _in_kinds(
    rule: Drift, loads: Mapping[str, str], found: dict[str, Any] | None
) -> dict[str, str]:
    """Returns the conditions of a rule of drift with their kinds, by layer."""
    origin = f"the validation documents of {rule.reference or 'the run'}"
    return with_kinds(loads, found, rule.above, origin)


def _named(between: Mapping[str, dict[str, Any] | None], limit: float) -> dict[str, Any]:
    """Returns the known distances by reference, each with the kind of its drift."""
    known = {reference: found for reference, found in between.items() if found is not None}
    return {one: {**found, "drifted": drifted(found, limit)} for one, found in known.items()}
