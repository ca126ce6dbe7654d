"""Opens the weights of any folder that holds a model: a run, a converted or a released one."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from moe_jax import data
from moe_jax.analysis.routing_table import RoutingTable, install
from moe_jax.errors import ConfigError
from moe_jax.interop import folders, huggingface, native
from moe_jax.models import Model, ModelConfig
from moe_jax.models.adapters import merged
from moe_jax.parallel import make_mesh
from moe_jax.run import workdir
from moe_jax.run.best import Step, step_of
from moe_jax.run.predecessors import FinishedRun
from moe_jax.run.restored import fitting
from moe_jax.training.step_folders import latest_step

_DEFAULT_WINDOW = 1024


@dataclasses.dataclass(frozen=True)
class FolderModel:
    """A model with its weights.

    Attributes:
        model: Decoder or encoder-decoder.
        tokenizer: Tokenizer of the model; ``None`` if the folder has none.
        window: Number of tokens that the model reads at once by default.
        vocab_size: Vocabulary size ``V``.
        start_id: Token id that the decoder of an encoder-decoder reads first.
        mesh: Mesh of devices; ``None`` for the default device.
    """

    model: Model
    tokenizer: data.Tokenizer | None
    window: int
    vocab_size: int
    start_id: int = 0
    mesh: Mesh | None = None

    def on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """Returns the context in which the model computes."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)


def open_folder(
    folder: str | Path,
    step: Step,
    check: Callable[[ModelConfig], None],
    *,
    texts: bool = True,
    average: bool = True,
    routing_table: str = "",
) -> FolderModel:
    """Opens a run, a converted model or a model of ``transformers``.

    Args:
        folder: Folder of the model.
        step: Step of the checkpoint of a run, or ``best``; ``None`` for the newest intact one.
        check: Function that rejects a configuration, called before weights are loaded.
        texts: True if the model reads texts, for which it needs a tokenizer.
        average: False takes the last parameters of a run instead of their average.
        routing_table: File of ``moe-jax tabulate`` that the routers of a decoder read; an empty
            name leaves them as they are.

    Raises:
        ConfigError: If the folder holds no model or no tokenizer, ``check`` rejects the model, or
            the table is not one of the model.
        CheckpointError: If no checkpoint is intact, or the one of ``step`` is not.
    """
    table = RoutingTable.load(routing_table) if routing_table else None
    found = _any(Path(folder), step, check, texts, average)
    if table is not None:
        install(found.model, table)
    return found


def check_folder(
    folder: Path | str,
    check: Callable[[ModelConfig], None],
    flag: str = "--model",
    *,
    texts: bool = False,
) -> None:
    """Rejects a folder without a model that ``check`` accepts, before weights are loaded.

    Args:
        folder: Folder of the model.
        check: Function that rejects a configuration.
        flag: Flag that names the folder.
        texts: True also rejects a folder without a tokenizer.

    Raises:
        ConfigError: If so.
    """
    kind, folder = folders.kind_of(folder), Path(folder)
    if kind == "none":
        raise ConfigError(
            f"{flag}={folder} holds no run, no converted model and no model of transformers: give "
            "the --workdir of a run, or a folder with config.json and safetensors files"
        )
    if kind == "run" and latest_step(folder / workdir.CHECKPOINTS) is None:
        raise ConfigError(f"{folder} holds no checkpoint yet: train first")
    check(workdir.load(folder).model if kind == "run" else folders.describe(folder).config)
    if texts:
        _check_tokenizer(folder)


def _check_tokenizer(folder: Path) -> None:
    """Rejects a folder without a tokenizer; every run has one."""
    if folders.kind_of(folder) != "run" and not folders.tokenizer_of(folder):
        raise ConfigError(f"{folder} has no tokenizer: copy its tokenizer.json into the folder")


def _any(
    folder: Path, step: Step, check: Callable[[ModelConfig], None], texts: bool, average: bool
) -> FolderModel:
    check_folder(folder, check)
    kind = folders.kind_of(folder)
    if kind == "run":
        return _run(folder, step, average)
    if step is not None:
        raise ConfigError(f"--step selects a checkpoint of a run, and {folder} is no run")
    if not average:
        raise ConfigError(f"--noaverage selects parameters of a run, and {folder} is no run")
    if texts:
        _check_tokenizer(folder)
    name = folders.tokenizer_of(folder)
    tokenizer = data.open_tokenizer(data.DataConfig(tokenizer=name)) if name else None
    found = native.load(folder) if kind == "moe_jax" else huggingface.load(folder)
    start = found.original.get("decoder_start_token_id") or 0
    return FolderModel(found.model, tokenizer, _DEFAULT_WINDOW, found.vocab_size, start)


def _run(folder: Path, step: Step, average: bool) -> FolderModel:
    experiment = workdir.load(folder)
    tokenizer = data.load_tokenizer(folder)
    mesh = make_mesh(fitting(experiment.mesh))
    run = FinishedRun("--model", folder, experiment, tokenizer)
    graph, state = run.weights(mesh, step_of(folder, step), average=average)
    model = merged(nnx.merge(graph, state.params, state.router_state))
    length, start = experiment.data.seq_length, tokenizer.pad_id
    return FolderModel(model, tokenizer, length, tokenizer.vocab_size, start, mesh)
