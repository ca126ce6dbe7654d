"""Opens the model that a change starts from: a run, a released or a converted model."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moe_jax import data
from moe_jax.analysis.texts import batch_of
from moe_jax.config.experiment import Experiment
from moe_jax.data.documents import read_documents
from moe_jax.data.sentinels import WithSentinels
from moe_jax.data.spare import without_spare_ids
from moe_jax.errors import ConfigError
from moe_jax.interop import folders, huggingface, native
from moe_jax.models import DecoderConfig
from moe_jax.nn.positions import Learned
from moe_jax.parallel import make_mesh
from moe_jax.run import workdir
from moe_jax.run.best import Step, step_of
from moe_jax.run.corpus import pair_of
from moe_jax.run.predecessors import FinishedRun
from moe_jax.run.released import remembered
from moe_jax.run.restored import fitting
from moe_jax.surgery.evidence import Batch
from moe_jax.surgery.weights import LayerWeights
from moe_jax.training.state import named_leaves
from moe_jax.training.step_folders import latest_step

_ROWS, _LENGTH = 8, 256


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """An opened model.

    Attributes:
        folder: Folder of the model, which nothing writes to.
        weights: The model, in which adapters are merged.
        run: Run in the folder; ``None`` for a released or a converted model.
        family: ``model_type`` of the model in ``transformers``, or "".
        original: Content of the released ``config.json``, or an empty dict.
        mesh: Mesh of devices of a run; ``None`` for the default device.
    """

    folder: Path
    weights: LayerWeights
    run: FinishedRun | None
    family: str
    original: dict[str, Any]
    mesh: Mesh | None = None

    @property
    def experiment(self) -> Experiment | None:
        """Configuration of the run, or ``None``."""
        return None if self.run is None else self.run.experiment

    def without_lookahead(self) -> OpenedModel:
        """Returns the model without its modules that look ahead."""
        return dataclasses.replace(self, weights=self.weights.without_lookahead())

    def on_devices(self) -> contextlib.AbstractContextManager[Any]:
        """Returns a context in which the model computes on its mesh."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def batches(self, count: int, file: str = "") -> Iterator[Batch]:
        """Yields the first batches of a text.

        Args:
            count: Largest number of batches.
            file: Text file, or .jsonl file with a ``text`` in each line; "" for the validation set
                of a run. An encoder-decoder reads a part of a text and its decoder the rest; see
                ``moe_jax.run.corpus``.

        Raises:
            ConfigError: If there is no text, or no tokenizer.
        """
        if self.run is not None and not file:
            found = self._validation(self.run)
        elif not file:
            raise ConfigError(
                f"{self.folder} has no validation set: give a text that its experts read (--file)"
            )
        elif isinstance(self.weights.model, DecoderConfig):
            found = _batches_of(file, self.tokenizer(), self._row_length)
        else:
            found = _pairs_of(file, self.tokenizer(), self._start_id(), self._row_length)
        return (_arrays(batch) for batch in itertools.islice(found, count))

    @property
    def _row_length(self) -> int:
        """Largest number of tokens of a row; learned positions may be fewer."""
        positions = self.weights.model.positions
        return min(_LENGTH, positions.length) if isinstance(positions, Learned) else _LENGTH

    @staticmethod
    def _validation(run: FinishedRun) -> Iterator[Batch]:
        """Yields the validation batches, those of the parts of a blend in turn."""
        parts = run.experiment.data.parts.values()
        each = [data.eval_batches(part, run.tokenizer) for part in parts]
        for batches in itertools.zip_longest(*each):
            yield from (batch for batch in batches if batch is not None)

    def _start_id(self) -> int:
        """Returns the first input of the decoder of an encoder-decoder."""
        if self.run is not None:
            return self.run.tokenizer.pad_id
        return self.original.get("decoder_start_token_id") or 0

    def tokenizer(self) -> data.Tokenizer:
        """Returns the tokenizer of the model.

        Raises:
            ConfigError: If the folder has none.
        """
        if self.run is not None:
            return self.run.tokenizer
        name = folders.tokenizer_of(self.folder)
        if not name:
            raise ConfigError(f"{self.folder} has no tokenizer: copy its tokenizer.json into it")
        return data.open_tokenizer(data.DataConfig(tokenizer=name))


def _arrays(batch: Batch) -> Batch:
    return {name: jax.tree.map(np.asarray, value) for name, value in batch.items()}


def _batches_of(file: str, tokenizer: data.Tokenizer, length: int) -> Iterator[Batch]:
    """Yields batches of rows of ``length`` tokens, cut from each document; a last row is padded."""
    rows = (row for text in read_documents(Path(file)) for row in _rows_of(text, tokenizer, length))
    while batch := list(itertools.islice(rows, _ROWS)):
        ids = np.zeros((_ROWS, length + 1), np.int32)
        segments = np.zeros((_ROWS, length), np.int32)
        for index, row in enumerate(batch):
            ids[index, : len(row)] = row
            segments[index, : len(row) - 1] = 1
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), segments.shape)
        yield {
            "inputs": ids[:, :-1],
            "targets": ids[:, 1:],
            "segments": segments,
            "positions": positions,
        }


def _rows_of(text: str, tokenizer: data.Tokenizer, length: int) -> Iterator[list[int]]:
    """Yields rows of up to ``length`` predicted tokens, each with the token before them."""
    ids = [tokenizer.bos_id, *tokenizer.encode(text).tolist()]
    for start in range(0, len(ids) - 1, length):
        yield ids[start : start + length + 1]


def _pairs_of(file: str, tokenizer: data.Tokenizer, start_id: int, length: int) -> Iterator[Batch]:
    """Yields batches of sources and targets, cut from each document; a last row is padded."""
    # Spans of three tokens are 15 % of a text, and each needs a sentinel.
    marked = without_spare_ids(tokenizer)
    most = 20 * marked.sentinels if isinstance(marked, WithSentinels) else length
    texts = (tokenizer.encode(text) for text in read_documents(Path(file)))
    cut = (part for ids in texts for part in _cut(ids, min(most, length - 1)))
    pairs = (pair_of(tokenizer, ids, number, start_id)[0] for number, ids in enumerate(cut))
    while rows := list(itertools.islice(pairs, _ROWS)):
        batch = batch_of(rows, _ROWS, length, length)
        targets = np.zeros((_ROWS, length), np.int32)
        for row, text in enumerate(rows):
            targets[row, : len(text.tokens)] = [*text.tokens[1:], tokenizer.eos_id]
        yield {**batch, "targets": targets}


def _cut(ids: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """Yields parts of at most ``most`` ids."""
    for start in range(0, len(ids), most):
        yield ids[start : start + most]


def open_source(folder: str | Path, step: Step = None, *, flag: str = "--input") -> OpenedModel:
    """Opens a model for reading.

    Args:
        folder: Workdir of a run, or folder of a released or converted model.
        step: Step of the checkpoint of a run, or ``best``; ``None`` for the newest intact one. The
            averaged parameters are read if the run keeps an average.
        flag: Flag that names the folder, for messages.

    Raises:
        ConfigError: If the folder holds no model, or a step is given without a run.
        CheckpointError: If no checkpoint is intact, or the one of ``step`` is not.
    """
    folder = Path(folder)
    kind = folders.kind_of(folder)
    if kind == "none":
        raise ConfigError(
            f"{flag}={folder} holds no run, no converted model and no model of transformers"
        )
    if kind == "run":
        return _run(folder, step, flag)
    if step is not None:
        raise ConfigError(f"--step selects a checkpoint of a run, and {folder} is no run")
    found = native.load(folder) if kind == "moe_jax" else huggingface.load(folder)
    weights = LayerWeights.of_model(found.model)
    return OpenedModel(folder, weights, None, found.family, found.original)


def _run(folder: Path, step: Step, flag: str) -> OpenedModel:
    experiment = workdir.load(folder)
    if latest_step(folder / workdir.CHECKPOINTS) is None:
        raise ConfigError(f"{folder} holds no checkpoint yet: train first")
    tokenizer, known = data.load_tokenizer(folder), remembered(folder)
    run = FinishedRun(flag, folder, experiment, tokenizer)
    mesh = make_mesh(fitting(experiment.mesh))
    _, state = run.weights(mesh, step_of(folder, step))
    leaves = named_leaves({"params": state.params, "router_state": state.router_state})
    with jax.set_mesh(mesh):
        weights = LayerWeights.of_leaves(experiment.model, tokenizer.vocab_size, leaves).merged()
    family, original = known.get("family", ""), known.get("original") or {}
    return OpenedModel(folder, weights, run, family, original, mesh)
