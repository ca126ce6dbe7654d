"""Grows a run in the middle of its training: optimizer, data position and step follow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import data
from moe_jax.config.experiment import Experiment
from moe_jax.errors import ConfigError
from moe_jax.models import ModelConfig
from moe_jax.models.places import places
from moe_jax.run import workdir
from moe_jax.run.predecessors import FinishedRun
from moe_jax.run.restored import fitting
from moe_jax.run.session import open_checkpoints, open_session
from moe_jax.surgery.destination import changed_experiment, check_output, save_run
from moe_jax.surgery.growth import Growth
from moe_jax.surgery.mixture import mixtures, with_arrays
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
    experiment, tokenizer = workdir.load(source), data.load_tokenizer(source)
    run = FinishedRun("--workdir", source, experiment, tokenizer)
    session = open_session(_fitting(experiment), tokenizer)
    with open_checkpoints(experiment, source / workdir.CHECKPOINTS, read_only=True) as checkpoints:
        found = checkpoints.restore(named_leaves(session.abstract))
    if found is None:
        raise ConfigError(f"{source} holds no checkpoint yet: train first")
    step, leaves, saved = found
    with jax.set_mesh(session.mesh):
        weights = LayerWeights.of_leaves(experiment.model, tokenizer.vocab_size, leaves)
        larger, _ = growth(weights)
        after = changed_experiment(run, larger, overrides or {})
        if after.data != experiment.data:
            raise ConfigError("a run that goes on keeps its data: leave data.NAME out of a growth")
        new = open_session(_fitting(after), tokenizer)
        first = named_leaves(new.recipe.create()[1])
        followed = follow(leaves, first, weights, growth)
        placed = {name: jax.device_put(followed[name], first[name].sharding) for name in first}
    save_run(run, after, placed, output, step=step, position=split(saved)[0])


def _fitting(experiment: Experiment) -> Experiment:
    return dataclasses.replace(experiment, mesh=fitting(experiment.mesh))


def follow(old: Leaves, first: Leaves, weights: LayerWeights, growth: Growth) -> dict[str, Any]:
    """Returns the state of the larger run.

    Parameters and routers' state are grown, and an average of the parameters is grown as they are.
    Moments of an optimizer go with their parameters without scaling, and those of new units are
    zero. A part of the optimizer with an array that cannot follow starts anew as a whole, such as
    the factored moments of Adafactor or the use of experts in ``optimizer.expert_rates``.

    Args:
        old: Arrays of the smaller run's state, by the names of ``named_leaves``.
        first: Arrays of the larger run's first state.
        weights: Weights of the smaller run.
        growth: Change of the experts.
    """
    larger, _ = growth(weights)
    moved = {n: x for n, x in old.items() if not n.startswith((_OPTIMIZER, *WEIGHTS))}
    moved |= larger.leaves()
    for prefix, tree in _trees(old).items():
        arrays = _by_layer(tree, weights.model)
        if prefix.endswith(_AVERAGE):
            average = dataclasses.replace(weights, arrays={**weights.arrays, **arrays})
            grown = growth(average)[0].arrays
        else:
            grown = _moments(arrays, weights, growth)
        moved |= _by_leaf(grown, larger.model, prefix, first)
    return dict(first) | _whole(moved, old, first)


def _trees(leaves: Leaves) -> dict[str, dict[str, Any]]:
    """Returns the trees of arrays of the optimizer that have the shapes of their parameters.

    Returns:
        For each prefix, such as ``opt_state/1/0/mu``, its arrays by the names of parameters.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, leaf in leaves.items():
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
    """Returns the arrays under a prefix of the larger run's state; scanned layers are stacked."""
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


def _moments(arrays: Leaves, weights: LayerWeights, growth: Growth) -> Leaves:
    """Returns the moments of the larger model, in which they follow their parameters."""
    moments = dataclasses.replace(weights, arrays=arrays)
    here = mixtures(moments)
    followed = {n: one.follow(here[n]) for n, one in growth.layers_of(weights).items()}
    return with_arrays(moments, followed).arrays


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
