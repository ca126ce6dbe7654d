"""Judges the evaluation of a run by its alarms, and says what has drifted: data or routing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from moe_jax import data
from moe_jax.analysis.drift import drifted
from moe_jax.analysis.drift_kinds import distances, with_kinds
from moe_jax.models import Model
from moe_jax.models.adapters import merged
from moe_jax.monitor import ALARMS, Drift, on_stream
from moe_jax.monitor.watch import names_of
from moe_jax.run.alarms import lines_to_compare
from moe_jax.run.opened import FolderModel
from moe_jax.run.reference_stream import reference_stream, validation_stream
from moe_jax.run.session import Session
from moe_jax.training.state import TrainState


def judged(
    session: Session, state: TrainState, folder: Path, step: int, means: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns an evaluation with the conditions of the run's alarms on the evaluated stream.

    A rule of drift without a reference compares with the run's last validation up to ``step``. A
    run without alarms gets its evaluation as it is. The kind of a drift follows from two streams of
    at most 64 validation documents per part of the data: those of the reference through its model,
    and the evaluated ones through this model. ``moe_jax.run.reference_stream`` says where the kind
    stays unknown.

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
        references = {rule.reference for rule in rules.values()}
        between: dict[str, dict[str, Any] | None] = dict.fromkeys(references)
        if jax.process_count() == 1:  # One process cannot compute with the arrays of several.
            model = merged(nnx.merge(session.graph, state.params, state.router_state))
            between = _between(references, folder, _opened(session, model), experiment.data)
        record["drift"] = _named(between, min(rule.above for rule in rules.values()))
        for name, rule in rules.items():
            found[name] = _in_kinds(rule, found.get(name, {}), between[rule.reference])
    found = {name: layers for name, layers in found.items() if layers}
    return {**record, ALARMS: found, "active_alarms": sum(map(len, found.values()))}


def _opened(session: Session, model: Model) -> FolderModel:
    tokenizer, length = session.tokenizer, session.experiment.data.seq_length
    size, start = tokenizer.vocab_size, tokenizer.pad_id
    return FolderModel(model, tokenizer, length, size, start, session.mesh)


def _between(
    references: Iterable[str], folder: Path, opened: FolderModel, evaluated: data.DataConfig
) -> dict[str, dict[str, Any] | None]:
    """Returns the distances from each reference; ``None`` if the kind of a drift is unknown."""
    before = {one: reference_stream(one, folder, opened) for one in sorted(references)}
    if not any(before.values()):
        return dict.fromkeys(before)
    after = validation_stream(opened, evaluated)
    return {one: distances(found, after) if found else None for one, found in before.items()}


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
