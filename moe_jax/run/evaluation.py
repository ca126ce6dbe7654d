"""Other settings for the evaluation of a run: other data, another capacity, other devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_jax.config.experiment import Experiment
from moe_jax.config.loading import experiment_of
from moe_jax.config.schema import build, describe
from moe_jax.errors import ConfigError
from moe_jax.parallel import MeshConfig, make_mesh
from moe_jax.run.predecessors import abstract_weights

_OF_TOKENIZER = ("data.tokenizer", "data.vocab_size")
_READ = ("data.", "mesh.", "model.", "training.loss_chunk", "training.alarms")


def changed(
    experiment: Experiment, overrides: Mapping[str, Any], capacity_factor: float = 0.0
) -> Experiment:
    """Returns the experiment of a run with other settings of its evaluation.

    Another ``data.source`` is the source of the validation text too, whatever source the validation
    of the run has.

    Args:
        experiment: Configuration of the run.
        overrides: New values of settings that an evaluation reads, by dotted name.
        capacity_factor: Capacity factor of every router; 0 keeps the capacities.

    Raises:
        ConfigError: If an evaluation does not read a setting, or settings contradict each other.
    """
    for name in overrides:
        if name.startswith(_OF_TOKENIZER):
            raise ConfigError(f"{name} belongs to the weights of the run: leave it out")
        if not name.startswith(_READ):
            raise ConfigError(f"{name} has no effect on an evaluation: leave it out")
    if capacity_factor:
        if not experiment.moe_layers:
            raise ConfigError("--capacity_factor has no effect: the model has no experts")
        experiment = build(Experiment, _with_capacity(describe(experiment), capacity_factor))
    if "data.source" in overrides:
        overrides = {"data.eval_source": "", **overrides}
    return experiment_of(experiment, overrides)


def check_same_weights(before: Experiment, after: Experiment, vocab_size: int) -> None:
    """Rejects settings of the model that change its parameters.

    Raises:
        ConfigError: If so; the message names the first parameter that differs.
    """
    if before.model == after.model:
        return
    mesh = make_mesh(MeshConfig())
    old, new = (abstract_weights(one, vocab_size, mesh) for one in (before, after))
    shapes = [{name: leaf.shape for name, leaf in leaves.items()} for leaves in (old, new)]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        there, here = (one.get(name, "none") for one in shapes)
        if there != here:
            raise ConfigError(
                f"these settings change the parameters of the model ({name} is {there} in the run, "
                f"{here} here): leave out those of model.* that change sizes"
            )


def _with_capacity(described: Any, factor: float) -> Any:
    """Returns a described part of a model with the factor in each of its capacities."""
    if isinstance(described, list):
        return [_with_capacity(item, factor) for item in described]
    if not isinstance(described, dict):
        return described
    found = {name: _with_capacity(item, factor) for name, item in described.items()}
    if isinstance(capacity := found.get("capacity"), dict):
        dropless = "always" if capacity["dropless"] == "always" else "never"
        capacity |= {"eval_factor": factor, "eval_fraction": 0.0, "dropless": dropless}
    return found
