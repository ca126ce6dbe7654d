"""Writes a changed model: a run at step 0, a folder of transformers, or a converted model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from moe_jax import data, files
from moe_jax.config.experiment import Experiment
from moe_jax.config.loading import experiment_of
from moe_jax.errors import ConfigError
from moe_jax.interop import folders, huggingface, native
from moe_jax.interop.huggingface import FAMILIES, Imported
from moe_jax.interop.huggingface.description import description, families_of
from moe_jax.interop.huggingface.families import family_of
from moe_jax.interop.staging import replaced
from moe_jax.models import DecoderConfig, EncoderDecoderConfig, ModelConfig
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.processes import check_one_process
from moe_jax.quantised.packed import PackedLeaves, note_of
from moe_jax.routing import Router
from moe_jax.run import workdir
from moe_jax.run.evaluation import check_same_weights
from moe_jax.run.predecessors import FinishedRun, check_teacher, open_sources
from moe_jax.run.restored import on_fitting_mesh
from moe_jax.run.session import open_checkpoints, open_session
from moe_jax.surgery.mixture import neighbour_groups
from moe_jax.surgery.source import OpenedModel
from moe_jax.surgery.weights import LayerWeights
from moe_jax.training.average import averaged_names
from moe_jax.training.checkpoint import add_packed
from moe_jax.training.history import TOKENIZER, digest
from moe_jax.training.state import TrainState, from_named_leaves, named_leaves

Kind = Literal["run", "hf", "moe_jax"]
"""File in a folder of ``transformers`` whose weights are those of codes."""


def check_output(output: Path) -> None:
    """Rejects an output folder that cannot be written or is not empty, and several processes.

    Raises:
        ConfigError: If so.
    """
    check_one_process("a change of a model runs")
    files.check_folder(output, "--output")
    native.require_empty(output)


def write(
    source: OpenedModel,
    weights: LayerWeights,
    output: Path,
    *,
    family: str = "",
    overrides: Mapping[str, Any] | None = None,
    packed: PackedLeaves | None = None,
) -> Kind:
    """Writes a model that was made from ``source``, atomically.

    A run becomes a run. A released or converted model becomes a folder of ``transformers`` if a
    family can express it, else a converted model.

    Args:
        source: Model that was changed.
        weights: Changed model.
        output: Folder to write, empty or missing.
        family: ``model_type`` to write; "" for the family of the source, or another that fits.
        overrides: New settings of a run by dotted name, such as ``training.steps``.
        packed: Quantised weights, which a run or a converted model holds as codes; ``None`` for
            none. A folder of ``transformers`` holds the weights that the codes stand for.

    Returns:
        The kind of the written folder.

    Raises:
        ConfigError: If the settings contradict the model, or the family cannot express it.
    """
    check_writable(source, weights.model, family=family, overrides=overrides)
    if source.run is not None:
        _write_run(source.run, weights, output, overrides or {}, packed)
        return "run"
    return _write_model(source, weights, output, family, packed)


def check_writable(
    source: OpenedModel,
    model: ModelConfig | None,
    *,
    family: str = "",
    overrides: Mapping[str, Any] | None = None,
) -> None:
    """Rejects settings and families with which a changed model cannot be written.

    Args:
        source: Model that is changed.
        model: Configuration of the changed model; ``None`` if it is not known yet.
        family: See ``write``.
        overrides: See ``write``.

    Raises:
        ConfigError: If the settings contradict the model, or the family cannot express it.
    """
    if source.run is None and overrides:
        raise ConfigError(f"{source.folder} is no run and has no settings: leave out --config.NAME")
    if source.run is not None and family:
        raise ConfigError("a run becomes a run: leave --family out, and convert it afterwards")
    if model is None:
        return
    if source.run is not None:
        here = on_fitting_mesh(changed_experiment(source.run, model, overrides or {}))
        here.check_program(jax.device_count())
    elif family:
        size = source.weights.vocab_size
        description(family_of(family), model, size, "float32", source.original)


def _write_run(
    run: FinishedRun,
    weights: LayerWeights,
    output: Path,
    overrides: Mapping[str, Any],
    packed: PackedLeaves | None,
) -> None:
    """Writes the workdir of a run whose first state has the weights and a new optimizer."""
    experiment = changed_experiment(run, weights.model, overrides)
    session = open_session(on_fitting_mesh(experiment), run.tokenizer)

    def put(state: TrainState, leaves: Mapping[str, Any]) -> TrainState:
        return from_named_leaves(state, named_leaves(state) | dict(leaves))

    with jax.set_mesh(session.mesh):
        state = session.recipe.create_from(put, weights.leaves())
    save_run(run, experiment, named_leaves(state), output, packed=packed)


def save_run(
    run: FinishedRun,
    experiment: Experiment,
    leaves: dict[str, Any],
    output: Path,
    *,
    step: int = 0,
    position: Mapping[str, Any] | None = None,
    packed: PackedLeaves | None = None,
) -> None:
    """Writes the workdir of a run with one checkpoint, atomically.

    Args:
        run: Run that was changed.
        experiment: Configuration of the new run.
        leaves: Arrays of the new run's state, by the names of ``named_leaves``.
        output: Folder to write, empty or missing.
        step: Step of the checkpoint.
        position: Position in the data; ``None`` for the first batch.
        packed: Quantised weights in place of arrays; ``None`` for none.
    """
    corpus = _corpus(run, experiment)
    with replaced(output) as folder:
        run.tokenizer.save(folder)
        run.keep(folder)
        identities = open_sources(experiment, folder).identities
        workdir.claim(folder, experiment, identities)
        workdir.record_corpus(folder, corpus)
        with open_checkpoints(experiment, folder / workdir.CHECKPOINTS) as checkpoints:
            notes = {**(position or {}), TOKENIZER: digest(run.tokenizer)}
            saved, packed = _parted(leaves, packed)
            checkpoints.save(step, saved, notes)
        if packed is not None:
            add_packed(folder / workdir.CHECKPOINTS, step, packed)


def _parted(
    leaves: dict[str, Any], packed: PackedLeaves | None
) -> tuple[dict[str, Any], PackedLeaves | None]:
    """Returns the arrays without codes, and the codes of parameters and of their average."""
    if packed is None:
        return leaves, None
    averages = averaged_names(leaves)
    named = {averages[name]: parts for name, parts in packed.leaves.items()}
    packed = dataclasses.replace(packed, leaves={**packed.leaves, **named})
    return {name: leaf for name, leaf in leaves.items() if name not in packed.leaves}, packed


def changed_experiment(
    run: FinishedRun, model: ModelConfig, overrides: Mapping[str, Any]
) -> Experiment:
    """Returns the configuration of the run that goes on with a changed model from step 0.

    Raises:
        ConfigError: If a setting changes the parameters of the model, or contradicts another.
    """
    vocab_size = run.tokenizer.vocab_size
    experiment = with_model(run.experiment, model, overrides, vocab_size)
    reason = data.contradiction(experiment.data, run.experiment.data, run.tokenizer)
    if reason:
        raise ConfigError(f"the model keeps its tokenizer: {reason}")
    return experiment


def with_model(
    before: Experiment, model: ModelConfig, overrides: Mapping[str, Any], vocab_size: int
) -> Experiment:
    """Returns the configuration of a run at step 0 with a changed model and new settings.

    Args:
        before: Configuration of the run that was changed.
        model: Changed model.
        overrides: New settings by dotted name.
        vocab_size: Number of embedding rows.

    Raises:
        ConfigError: If a setting changes the parameters of the model, or contradicts another, if
            the mesh of the run does not divide the experts, or if a teacher does not fit.
    """
    assert isinstance(model, DecoderConfig | EncoderDecoderConfig)  # as every model of a run
    training = dataclasses.replace(before.training, start_from="", start_with="all")
    changed = dataclasses.replace(before, model=model, training=training)
    experiment = experiment_of(changed, overrides)
    check_same_weights(changed, experiment, vocab_size)
    _check_settings(before, experiment, overrides)
    check_teacher(on_fitting_mesh(experiment))
    experiment.check_experts(experiment.mesh.expert)  # whatever devices are here
    return experiment


# Settings of a router that a growth multiplies and that a schedule may hold, by name.
_ROUTED: Mapping[str, Callable[[Router], Any]] = {
    "top_k": lambda router: getattr(router.select, "k", None),
    "capacity_factor": lambda router: router.capacity.factor,
}


def _check_settings(before: Experiment, after: Experiment, overrides: Mapping[str, Any]) -> None:
    """Rejects settings that mean other experts or other choices after a change.

    Raises:
        ConfigError: If so; the message names the setting to give.
    """
    old, new = (
        {layer.name: layer.moe for layer in experiment.model.sparse_layers()}
        for experiment in (before, after)
    )
    both = [(old[name], new[name]) for name in old.keys() & new.keys()]
    first = before.optimizer.frozen_experts
    if first and any(one.num_experts != other.num_experts for one, other in both):
        _require("optimizer.frozen_experts", overrides, f"freezes its first {first} experts")
    if after.optimizer.frozen_experts and any(_inserts(one, other) for one, other in both):
        raise ConfigError(
            "the router compares experts within groups of neighbours, and new experts join the "
            "group of the expert that they copy, so the old experts are not the first ones: leave "
            "optimizer.frozen_experts at 0"
        )
    scheduled = {schedule.setting for schedule in before.training.schedules}
    for name in scheduled & _ROUTED.keys():
        if any(_ROUTED[name](one.router) != _ROUTED[name](other.router) for one, other in both):
            _require("training.schedules", overrides, f"has a schedule of {name}")


def _inserts(before: MoEConfig, after: MoEConfig) -> bool:
    """Returns whether a growth puts new experts between old ones."""
    return after.num_experts > before.num_experts and neighbour_groups(before.router) > 1


def _require(setting: str, overrides: Mapping[str, Any], reason: str) -> None:
    if setting not in overrides:
        raise ConfigError(
            f"the run {reason}, which the change makes other ones: give the new value, "
            f"--config.{setting}"
        )


def _corpus(run: FinishedRun, experiment: Experiment) -> Mapping[str, Any]:
    """Returns the description of the corpus; equal data have the description in the old run."""
    known = workdir.recorded_corpus(run.folder)
    if known is not None and experiment.data == run.experiment.data:
        return known
    return dataclasses.asdict(data.read_contents(experiment.data))


def _write_model(
    source: OpenedModel,
    weights: LayerWeights,
    output: Path,
    family: str,
    packed: PackedLeaves | None,
) -> Kind:
    name = family or ("" if packed else family_for(source, weights))
    model, companions = weights.module(), folders.companions_of(source.folder)
    if name:
        notes = note_of(packed.summary()) if packed else None
        huggingface.save(
            model, output, name, original=source.original, companions=companions, texts=notes
        )
        return "hf"
    imported = Imported(model, weights.model, weights.vocab_size, source.family, source.original)
    native.save(imported, output, companions, packed)
    return "moe_jax"


def family_for(source: OpenedModel, weights: LayerWeights) -> str:
    """Returns a family that expresses a model, first of all the source's family; "" for none."""
    able = families_of(FAMILIES, weights.model)
    return source.family if source.family in able else next(iter(able), "")
