"""Exports a run as a model of a family of ``transformers``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from flax import nnx

from moe_jax import data
from moe_jax.errors import ConfigError
from moe_jax.interop import folders
from moe_jax.interop.huggingface import FAMILIES, Imported
from moe_jax.interop.huggingface.description import description, families_of
from moe_jax.models import ModelConfig
from moe_jax.models.adapters import merged
from moe_jax.parallel import make_mesh
from moe_jax.run import workdir
from moe_jax.run.best import Step, step_of
from moe_jax.run.predecessors import FinishedRun
from moe_jax.run.released import remembered
from moe_jax.run.restored import fitting
from moe_jax.training.step_folders import latest_step


def open_trained(
    folder: Path | str, family: str = "", step: Step = None, *, average: bool = True
) -> Imported:
    """Returns the model of a checkpoint of a run, finished or not.

    Args:
        folder: Workdir of the run.
        family: ``model_type`` to export to; "" for the family of the released model that the run,
            or an earlier run of its chain, started from.
        step: Step of the checkpoint, or ``best``; ``None`` for the newest intact one.
        average: False returns the trained parameters of a run that keeps an average of them.

    Raises:
        ConfigError: If the folder holds no run or no checkpoint yet, or if the family is unknown or
            cannot express the model. The error is raised before weights are loaded.
        CheckpointError: If no checkpoint is intact, or the one of ``step`` is not.
    """
    folder = Path(folder)
    experiment = workdir.load(folder)
    if latest_step(folder / workdir.CHECKPOINTS) is None:
        raise ConfigError(f"{folder} holds no checkpoint yet: train first")
    tokenizer = data.load_tokenizer(folder)
    name, original = target(folder, experiment.model, tokenizer, family)
    run = FinishedRun("--input", folder, experiment, tokenizer)
    mesh = make_mesh(fitting(experiment.mesh))
    graph, state = run.weights(mesh, step_of(folder, step), average=average)
    model = merged(nnx.merge(graph, state.params, state.router_state))
    return Imported(model, model.config, tokenizer.vocab_size, name, original)


def target(
    folder: Path, model: ModelConfig, tokenizer: data.Tokenizer, family: str = ""
) -> tuple[str, dict[str, Any]]:
    """Returns the family that a run is exported to, and the ``config.json`` that it starts from.

    Args:
        folder: Workdir of the run.
        model: Configuration of the model.
        tokenizer: Tokenizer of the run.
        family: ``model_type`` to export to; "" for the one that the run started from.

    Raises:
        ConfigError: If the family is unknown or cannot express the model.
    """
    known = remembered(folder)
    name = family or known.get("family") or _only_family(model, folder)
    original = _original(tokenizer, known.get("original") or {}, folder)
    description(FAMILIES[name], model, tokenizer.vocab_size, "float32", original)
    return name, original


def checkpoint_of(folder: Path, step: Step = None) -> Path:
    """Returns the folder of a checkpoint of a run.

    Args:
        folder: Workdir of the run.
        step: Step of the checkpoint, or ``best``; ``None`` for the newest one.
    """
    checkpoints, chosen = folder / workdir.CHECKPOINTS, step_of(folder, step)
    return checkpoints / str(latest_step(checkpoints) if chosen is None else chosen)


def tokenizer_texts(folder: Path | str) -> dict[str, str]:
    """Returns the files, by name, from which ``transformers`` loads the tokenizer of a run.

    A run that uses a released tokenizer has no such file: it keeps a copy of the released files.
    """
    if folders.kind_of(folder) != "run" or folders.tokenizer_of(folder):
        return {}
    return data.tokenizer_files(data.load_tokenizer(folder))


def _only_family(model: Any, folder: Path) -> NoReturn:
    """Raises a ``ConfigError`` that names the families which can express the model."""
    able = families_of(FAMILIES, model)
    if able:
        remedy = f"add --family={able[0]}"
        others = f"; {', '.join(able[1:])} can express it too" if able[1:] else ""
        raise ConfigError(f"{folder} did not start from a released model: {remedy}{others}")
    raise ConfigError(
        f"{folder} did not start from a released model, and no family can express its model: "
        "--family=NAME names the setting that does not fit"
    )


def _original(tokenizer: data.Tokenizer, known: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Returns the released model's ``config.json``, with the token ids of the run's tokenizer.

    A tokenizer that the released model came with keeps its token ids.
    """
    if folders.tokenizer_of(folder):
        return known
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_id") for kind in ("bos", "eos", "pad")}
    inner = known.get("text_config") or {}
    return {**known, **inner, **ids, "text_config": {}}
