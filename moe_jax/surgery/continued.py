"""Changes a run in the middle of its training: optimizer, data position and step follow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe_jax import data
from moe_jax.config.experiment import Experiment
from moe_jax.config.schema import describe, flat
from moe_jax.config.setting_schedules import FROZEN
from moe_jax.errors import ConfigError
from moe_jax.models import ModelConfig
from moe_jax.models.places import places
from moe_jax.run import workdir
from moe_jax.run.changes import CHANGEABLE
from moe_jax.run.predecessors import FinishedRun
from moe_jax.run.restored import on_fitting_mesh
from moe_jax.run.session import open_checkpoints, open_session
from moe_jax.surgery.destination import changed_experiment, check_output, save_run
from moe_jax.surgery.following import FollowedChange
from moe_jax.surgery.growth import Growth
from moe_jax.surgery.short_moments import shortened, written_out
from moe_jax.surgery.weights import LayerWeights
from moe_jax.training.history import split
from moe_jax.training.state import named_leaves
from moe_jax.training.transplant import WEIGHTS

Leaves = Mapping[str, Any]
_OPTIMIZER, _PARAMS, _AVERAGE = "opt_state/", "params/", "/average"


def grow_on(
    source: Path, output: Path, growth: Growth, overrides: Mapping[str, Any] | None = None
) -> None:
    """Writes a larger run that goes on at the step of the newest checkpoint of ``source``.

    Args:
        source: Workdir of a run.
        output: Folder to write, empty or missing.
        growth: Change of the experts.
        overrides: New settings by dotted name, none of the data.

    Raises:
        ConfigError: If the model cannot grow, a setting does not fit, or the folder is not empty.
            The error is raised before anything is written.
    """
    check_output(output)
    run = FinishedRun("--workdir", source, workdir.load(source), data.load_tokenizer(source))
    go_on(saved_state(run), output, growth, overrides or {})


@dataclasses.dataclass(frozen=True)
class SavedState:
    """The whole state of a run in a checkpoint.

    Attributes:
        run: The run.
        step: Step of the checkpoint.
        leaves: Arrays by the names of ``named_leaves``.
        position: Position in the data.
        mesh: Mesh of devices of the arrays.
    """

    run: FinishedRun
    step: int
    leaves: Leaves
    position: Mapping[str, Any]
    mesh: Mesh

    @property
    def weights(self) -> LayerWeights:
        """The trained parameters, not their average, and the routers' state."""
        size = self.run.tokenizer.vocab_size
        return LayerWeights.of_leaves(self.run.experiment.model, size, self.leaves)


def saved_state(run: FinishedRun, step: int | None = None) -> SavedState:
    """Reads the whole state of a run.

    Args:
        run: The run.
        step: Step of the checkpoint; ``None`` for the newest intact one.

    Raises:
        ConfigError: If there is no checkpoint.
        CheckpointError: If no checkpoint is intact, or the one of ``step`` is not.
    """
    session, folder = open_session(on_fitting_mesh(run.experiment), run.tokenizer), run.folder
    path = folder / workdir.CHECKPOINTS
    with open_checkpoints(run.experiment, path, read_only=True) as checkpoints:
        found = checkpoints.restore(named_leaves(session.abstract), step=step)
    if found is None:
        raise ConfigError(f"{folder} holds no checkpoint yet: train first")
    step, leaves, saved = found
    return SavedState(run, step, leaves, split(saved)[0], session.mesh)


def go_on(
    state: SavedState, output: Path, change: FollowedChange, overrides: Mapping[str, Any]
) -> tuple[LayerWeights, str]:
    """Writes a changed run that goes on at the step of its checkpoint.

    Args:
        state: State of the run before the change.
        output: Folder to write, empty or missing.
        change: Change of the experts.
        overrides: New settings by dotted name, none of the data.

    Returns:
        The changed weights, and the reason for which their function differs, or "".

    Raises:
        ConfigError: If the change does not fit, or a setting does not. The error is raised before
            anything is written.
    """
    run = state.run
    with jax.set_mesh(state.mesh):
        weights = state.weights
        changed, difference = change(weights)
        after = changed_experiment(run, changed.model, overrides)
        check_going_on(run.experiment, after)
        here = on_fitting_mesh(after)
        here.check_program(jax.device_count())
        new = open_session(here, run.tokenizer)
        first = named_leaves(new.recipe.create()[1])
        # The first state may lie on another mesh than the old one.
        followed = follow(state.leaves, jax.device_get(first), weights, change)
        placed = {name: jax.device_put(followed[name], first[name].sharding) for name in first}
    save_run(run, after, placed, output, step=state.step, position=state.position)
    return changed, difference


def check_continuable(
    run: FinishedRun, model: ModelConfig | None, overrides: Mapping[str, Any]
) -> None:
    """Rejects settings with which a changed run cannot go on.

    Args:
        run: The run.
        model: Configuration of the changed model; ``None`` if it is not known yet.
        overrides: New settings by dotted name.

    Raises:
        ConfigError: If the settings contradict the model; see also ``check_going_on``.
    """
    if model is not None:
        after = changed_experiment(run, model, overrides)
        check_going_on(run.experiment, after)
        on_fitting_mesh(after).check_program(jax.device_count())


def check_going_on(before: Experiment, after: Experiment) -> None:
    """Rejects settings that a run cannot have which goes on with its optimizer and its data.

    Args:
        before: Configuration of the run before the change.
        after: Configuration after the change.

    Raises:
        ConfigError: If data differ, or settings that give the optimizer other arrays.
    """
    if after.data != before.data:
        raise ConfigError("a run that goes on keeps its data: leave the settings data.NAME out")
    old, new = (_settings_of_arrays(experiment) for experiment in (before, after))
    changed = [name for name in old | new if old.get(name) != new.get(name)]
    if changed:
        raise ConfigError(
            f"{changed[0]} gives the optimizer other arrays, and a run that goes on keeps its "
            "optimizer: leave the setting as it was, or start a new optimizer"
        )


def _settings_of_arrays(experiment: Experiment) -> dict[str, Any]:
    """Returns the settings of the optimizer with which its arrays may differ, by dotted name."""
    named = {f"optimizer.{n}": v for n, v in flat(describe(experiment.optimizer)).items()}
    others = (*CHANGEABLE, "optimizer.frozen.")  # ``flat`` has one name for each frozen group
    found = {name: value for name, value in named.items() if not name.startswith(others)}
    found["optimizer.frozen"] = experiment.optimizer.frozen
    # Another number of frozen experts has the same arrays.
    found["optimizer.frozen_experts"] = bool(experiment.optimizer.frozen_experts)
    frozen = (s.setting for s in experiment.training.schedules if s.setting.startswith(FROZEN))
    return found | {"training.schedules": tuple(sorted(frozen))}


def follow(
    old: Leaves, first: Leaves, weights: LayerWeights, change: FollowedChange
) -> dict[str, Any]:
    """Returns the state of the changed run.

    Parameters, routers' state and an average of the parameters are changed. Moments of an optimizer
    go with their parameters as ``change.moments`` says; a growth does not scale them, and those of
    new units are zero. Moments that are shorter than their parameters follow too; see
    ``moe_jax.surgery.short_moments``. A part of the optimizer with an array that cannot follow
    starts anew as a whole.

    Args:
        old: Arrays of the old run's state, by the names of ``named_leaves``.
        first: Arrays of the changed run's first state.
        weights: Weights of the old run.
        change: Change of the experts.
    """
    changed, _ = change(weights)
    moved = {n: x for n, x in old.items() if not n.startswith((_OPTIMIZER, *WEIGHTS))}
    moved |= changed.leaves()
    whole = written_out(first)
    for prefix, tree in _trees(old).items():
        numbers = _over(weights, prefix, _by_layer(tree, weights.model))
        if prefix.endswith(_AVERAGE):
            new = change.average(prefix, numbers, weights)
        else:
            new = change.moments(prefix, numbers, weights)
        moved |= _by_leaf(new.arrays, changed.model, prefix, whole)
    return dict(first) | _whole(shortened(moved, first, old), old, first)


def _over(weights: LayerWeights, prefix: str, arrays: Leaves) -> LayerWeights:
    """Returns a model of an average of its parameters, or of moments in place of parameters."""
    beside = weights.arrays if prefix.endswith(_AVERAGE) else {}
    return dataclasses.replace(weights, arrays={**beside, **arrays})


def trees_of(weights: LayerWeights, leaves: Leaves) -> dict[str, LayerWeights]:
    """Returns the parameters under ``params``, and moments and average under their names.

    Args:
        weights: Weights of a run.
        leaves: Arrays of the run's state.
    """
    trees = {prefix: _by_layer(tree, weights.model) for prefix, tree in _trees(leaves).items()}
    return {"params": weights} | {n: _over(weights, n, arrays) for n, arrays in trees.items()}


def _trees(leaves: Leaves) -> dict[str, dict[str, Any]]:
    """Returns the trees of arrays of the optimizer that have the shapes of their parameters.

    Returns:
        For each prefix, such as ``opt_state/1/0/mu``, its arrays by the names of parameters.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, leaf in written_out(leaves).items():
        parts = name.split("/") if name.startswith(_OPTIMIZER) else []
        for cut in range(1, len(parts)):
            param = _PARAMS + "/".join(parts[cut:])
            if param in leaves and leaves[param].shape == leaf.shape:
                found.setdefault("/".join(parts[:cut]), {})[param] = leaf
                break
    return found


def _by_layer(tree: Leaves, model: ModelConfig) -> dict[str, Any]:
    """Returns the arrays of each layer, by names that do not depend on scans."""
    return {
        name: tree[place.leaf] if place.entry is None else tree[place.leaf][place.entry]
        for name, place in places(model).items()
        if place.leaf in tree
    }


def _by_leaf(
    arrays: Leaves, model: ModelConfig, prefix: str, first: Leaves
) -> dict[str, jax.Array]:
    """Returns the arrays under a prefix of the changed run's state; scanned layers are stacked."""
    found: dict[str, Any] = {}
    for name, place in places(model).items():
        leaf = f"{prefix}/{place.leaf.removeprefix(_PARAMS)}"
        if leaf not in first or not place.leaf.startswith(_PARAMS):
            continue
        # A parameter that the growth adds, such as a bias of logits, has no moments yet.
        array = arrays.get(name, first[leaf] if place.entry is None else first[leaf][place.entry])
        if place.entry is None:
            found[leaf] = array
        else:
            found.setdefault(leaf, []).append(array)  # ``places`` has layers in order
    return {n: jnp.stack(x) if isinstance(x, list) else x for n, x in found.items()}


def _whole(moved: Leaves, old: Leaves, first: Leaves) -> dict[str, Any]:
    """Returns the arrays that follow, with those parts of the optimizer that follow as a whole."""
    scalars = {name.rpartition("/")[0] for name, leaf in first.items() if not leaf.shape}
    found, broken = dict[str, Any](), set[str]()
    for name, leaf in first.items():
        array = moved.get(name, old.get(name))
        if array is not None and array.shape == leaf.shape:
            found[name] = array
        else:
            broken.add(_part(name, scalars))
    return {name: array for name, array in found.items() if _part(name, scalars) not in broken}


def _part(name: str, scalars: set[str]) -> str:
    """Returns the part of the optimizer that holds an array: the nearest path with a count."""
    parts = name.split("/") if name.startswith(_OPTIMIZER) else []
    paths = ("/".join(parts[:cut]) for cut in range(len(parts) - 1, 0, -1))
    return next((path for path in paths if path in scalars), name)
