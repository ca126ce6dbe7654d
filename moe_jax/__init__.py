"""Mixture-of-Experts research in JAX.

``import moe_jax as mj`` gives the names below; each name is loaded at its first use:

* ``mj.MoE`` is a mixture-of-experts layer for any Flax NNX model.
* ``mj.router`` returns a published router by name, ``mj.register_router`` adds a router.
* ``mj.train`` trains a model, ``mj.open_run`` opens an existing run.
* ``mj.load_config`` returns the settings of a config, ``mj.experiment`` returns them typed and
  checked.
* ``mj.count`` counts the parameters and FLOPs of a model.
* ``mj.load_hf`` and ``mj.save_hf`` read and write models of Hugging Face ``transformers``.
* ``mj.explain`` measures the effect of every expert on a text.
* ``mj.upcycle``, ``mj.prune``, ``mj.merge`` and ``mj.grow`` change the experts of a trained model.
* ``mj.hash_experts``, ``mj.diff_experts`` and ``mj.take_experts`` follow experts between models.
* ``mj.quantise`` writes a model whose experts have weights of eight or four bits.
* ``mj.distil`` makes a smaller student that learns from a mixture.
* ``mj.analyze`` measures what the experts of a model take from a corpus.
* ``mj.reproduce`` runs an ablation of a paper.
* ``mj.sweep`` trains runs over values of settings, ``mj.compare`` shows runs on one page.
* ``mj.ConfigError``, ``mj.TrainingError``, ``mj.CheckpointError`` and ``mj.Diverged`` are errors;
  their message is one line and names the remedy.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from moe_jax import signals

if TYPE_CHECKING:
    from moe_jax.ablation.reproduce import committed, reproduce
    from moe_jax.analysis.compare import compare
    from moe_jax.config.experiment import Experiment
    from moe_jax.config.loading import experiment_of as experiment
    from moe_jax.config.loading import load_config
    from moe_jax.counting.by_name import count
    from moe_jax.errors import CheckpointError, ConfigError, TrainingError
    from moe_jax.nn.layer import MoE
    from moe_jax.routing.presets import preset as router
    from moe_jax.routing.presets import register as register_router
    from moe_jax.run.analyzing import analyze
    from moe_jax.run.api import OpenRun, open_run, train
    from moe_jax.run.explaining import explain
    from moe_jax.run.loaded import LoadedModel, load_hf, save_hf
    from moe_jax.run.loop import Diverged
    from moe_jax.surgery.adapters import merge_adapters
    from moe_jax.surgery.api import distil, grow, merge, prune, upcycle
    from moe_jax.surgery.changed import ChangedModel
    from moe_jax.surgery.compared import (
        ExpertChange,
        ExpertVersion,
        diff_experts,
        hash_experts,
        take_experts,
    )
    from moe_jax.surgery.quantising import QuantisedModel, quantise
    from moe_jax.sweeps.sweep import sweep

    __version__: str

# ``sys.argv`` begins so while ``python -m moe_jax.train`` imports the package of that module.
if sys.argv[:1] == ["-m"]:
    signals.end_imports()

# The module that defines each public name, and the name in that module.
_HOMES = {
    "MoE": "moe_jax.nn.layer:MoE",
    "router": "moe_jax.routing.presets:preset",
    "register_router": "moe_jax.routing.presets:register",
    "load_config": "moe_jax.config.loading:load_config",
    "experiment": "moe_jax.config.loading:experiment_of",
    "Experiment": "moe_jax.config.experiment:Experiment",
    "count": "moe_jax.counting.by_name:count",
    "train": "moe_jax.run.api:train",
    "open_run": "moe_jax.run.api:open_run",
    "OpenRun": "moe_jax.run.api:OpenRun",
    "load_hf": "moe_jax.run.loaded:load_hf",
    "save_hf": "moe_jax.run.loaded:save_hf",
    "LoadedModel": "moe_jax.run.loaded:LoadedModel",
    "analyze": "moe_jax.run.analyzing:analyze",
    "explain": "moe_jax.run.explaining:explain",
    "upcycle": "moe_jax.surgery.api:upcycle",
    "prune": "moe_jax.surgery.api:prune",
    "merge": "moe_jax.surgery.api:merge",
    "merge_adapters": "moe_jax.surgery.adapters:merge_adapters",
    "distil": "moe_jax.surgery.api:distil",
    "grow": "moe_jax.surgery.api:grow",
    "ChangedModel": "moe_jax.surgery.changed:ChangedModel",
    "hash_experts": "moe_jax.surgery.compared:hash_experts",
    "diff_experts": "moe_jax.surgery.compared:diff_experts",
    "take_experts": "moe_jax.surgery.compared:take_experts",
    "ExpertVersion": "moe_jax.surgery.compared:ExpertVersion",
    "ExpertChange": "moe_jax.surgery.compared:ExpertChange",
    "quantise": "moe_jax.surgery.quantising:quantise",
    "QuantisedModel": "moe_jax.surgery.quantising:QuantisedModel",
    "committed": "moe_jax.ablation.reproduce:committed",
    "reproduce": "moe_jax.ablation.reproduce:reproduce",
    "sweep": "moe_jax.sweeps.sweep:sweep",
    "compare": "moe_jax.analysis.compare:compare",
    "ConfigError": "moe_jax.errors:ConfigError",
    "TrainingError": "moe_jax.errors:TrainingError",
    "CheckpointError": "moe_jax.errors:CheckpointError",
    "Diverged": "moe_jax.run.loop:Diverged",
}

__all__ = [
    "ChangedModel",
    "CheckpointError",
    "ConfigError",
    "Diverged",
    "Experiment",
    "ExpertChange",
    "ExpertVersion",
    "LoadedModel",
    "MoE",
    "OpenRun",
    "QuantisedModel",
    "TrainingError",
    "__version__",
    "analyze",
    "committed",
    "compare",
    "count",
    "diff_experts",
    "distil",
    "experiment",
    "explain",
    "grow",
    "hash_experts",
    "load_config",
    "load_hf",
    "merge",
    "merge_adapters",
    "open_run",
    "prune",
    "quantise",
    "register_router",
    "reproduce",
    "router",
    "save_hf",
    "sweep",
    "take_experts",
    "train",
    "upcycle",
]


def __getattr__(name: str) -> Any:
    """Returns a public name, which it imports at the first use."""
    if name == "__version__":
        value = importlib.import_module("importlib.metadata").version("moe_jax")
    elif name in _HOMES:
        module, _, attribute = _HOMES[name].partition(":")
        value = getattr(importlib.import_module(module), attribute)
    else:
        raise AttributeError(f"module 'moe_jax' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
