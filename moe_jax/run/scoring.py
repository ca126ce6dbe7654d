"""Log-likelihoods of texts under a model: of every token, and of every document."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax import data
from moe_jax.decoding import positions_of
from moe_jax.errors import ConfigError
from moe_jax.models import Decoder, DecoderConfig, Model, ModelConfig
from moe_jax.nn.mode import DECODE
from moe_jax.run.best import Step
from moe_jax.run.opened import open_folder

Array = jax.Array
# Number of positions whose logits are in memory at once.
_CHUNK = 128


@dataclasses.dataclass(frozen=True)
class ScoringModel:
    """A model that scores texts.

    Attributes:
        model: Decoder with its weights.
        tokenizer: Tokenizer of the model.
        window: Number of tokens that the model reads at once by default.
        mesh: Mesh of devices.
    """

    model: Decoder
    tokenizer: data.Tokenizer
    window: int
    mesh: Mesh | None = None


@dataclasses.dataclass(frozen=True)
class DocumentScore:
    """The log-likelihoods of a document, in nats.

    Attributes:
        tokens: Token ids ``(T,)`` of the document, without begin and end tokens.
        log_likelihoods: Log-likelihood ``(T,)`` of each token, given the tokens before it.
        size: Number of UTF-8 bytes of the document.
    """

    tokens: tuple[int, ...]
    log_likelihoods: tuple[float, ...]
    size: int

    @property
    def log_likelihood(self) -> float:
        """Log-likelihood of the document, the sum over its tokens."""
        return math.fsum(self.log_likelihoods)

    @property
    def bits_per_byte(self) -> float | None:
        """Negative log-likelihood in bits per byte; ``None`` for an empty document."""
        return -self.log_likelihood / math.log(2) / self.size if self.size else None


@dataclasses.dataclass(frozen=True)
class _Window:
    """A part of a document that the model reads at once.

    Attributes:
        inputs: Token ids ``(L,)`` that the model reads.
        targets: Token ids ``(L,)`` after them.
        scored: Index of the first target that no earlier window has scored.
    """

    inputs: Sequence[int]
    targets: Sequence[int]
    scored: int


def open_model(
    folder: str | Path, step: Step = None, *, average: bool = True, routing_table: str = ""
) -> ScoringModel:
    """Opens a run, a converted model or a model of ``transformers`` to score texts.

    Args:
        folder: Folder of the model.
        step: Step of the checkpoint of a run, or ``best``; ``None`` for the newest intact one.
        average: False opens the trained parameters of a run that keeps an average of them.
        routing_table: File of ``moe-jax tabulate`` that the routers read; empty for none.

    Raises:
        ConfigError: If the folder holds no model or no tokenizer, or if the model reads later
            tokens. The error is raised before weights are loaded.
        CheckpointError: If no checkpoint is intact, or the one of ``step`` is not.
    """
    found = open_folder(folder, step, require_causal, average=average, routing_table=routing_table)
    assert found.tokenizer is not None  # A model that reads texts has one.
    return ScoringModel(_decoder(found.model), found.tokenizer, found.window, found.mesh)


def scores(
    opened: ScoringModel,
    texts: Iterable[str],
    *,
    window: int = 0,
    overlap: int = 0,
    batch_size: int = 8,
) -> Iterator[DocumentScore]:
    """Yields the score of every text, in order.

    A text is read after the begin token. A text of more tokens than the window is read in several
    windows, and each later window reads the last ``overlap + 1`` tokens again as context. No token
    is dropped, so a score is independent of the batch.

    Args:
        opened: Model and tokenizer.
        texts: Documents.
        window: Number of tokens that the model reads at once; 0 for the default of the model.
        overlap: Number of tokens of the window before that a later window reads again as context.
        batch_size: Number of windows that are computed at once.

    Raises:
        ConfigError: If the window is longer than the positions of the model, or not longer than the
            overlap.
    """
    length = window or opened.window
    check_overlap(length, overlap)
    opened.model.config.check_length(length, "--window")
    first, second = itertools.tee(texts)
    rows = ([opened.tokenizer.bos_id, *opened.tokenizer.encode(text).tolist()] for text in first)
    whole, again = itertools.tee(rows)
    parts = (_windows(row, length, overlap) for row in again)
    found = _of_windows(opened, parts, length, batch_size)
    for text, row, of_row in zip(second, whole, found, strict=True):
        yield DocumentScore(tuple(row[1:]), tuple(of_row), len(text.encode()))


def check_overlap(window: int, overlap: int) -> None:
    """Rejects windows that go no further than the window before.

    Raises:
        ConfigError: If so.
    """
    if not 0 <= overlap < window:
        raise ConfigError(f"--overlap={overlap} is not below --window={window}: lower it")


def _windows(row: Sequence[int], length: int, overlap: int) -> list[_Window]:
    """Returns the windows of a document ``(1 + T,)``, which begins with the begin token."""
    found, scored = list[_Window](), 0
    while scored < len(row) - 1:
        start = max(scored - overlap, 0)
        end = min(start + length, len(row) - 1)
        found.append(_Window(row[start:end], row[start + 1 : end + 1], scored - start))
        scored = end
    return found


def _of_windows(
    opened: ScoringModel, documents: Iterable[list[_Window]], length: int, batch_size: int
) -> Iterator[list[float]]:
    """Yields the log-likelihoods of the tokens of each document, computed batch by batch."""
    first, second = itertools.tee(documents)
    numbers = _scored(opened, itertools.chain.from_iterable(second), length, batch_size)
    for windows in first:
        yield [value for _ in windows for value in next(numbers)]


def _scored(
    opened: ScoringModel, windows: Iterator[_Window], length: int, batch_size: int
) -> Iterator[list[float]]:
    """Yields the log-likelihoods of the targets that a window scores."""
    mesh = contextlib.nullcontext() if opened.mesh is None else jax.set_mesh(opened.mesh)
    while batch := list(itertools.islice(windows, batch_size)):
        inputs, targets = np.zeros((2, batch_size, length), np.int32)
        lengths = np.zeros(batch_size, np.int32)
        for i, one in enumerate(batch):
            lengths[i] = len(one.inputs)
            inputs[i, : lengths[i]], targets[i, : lengths[i]] = one.inputs, one.targets
        with mesh:
            valid = np.arange(length) < lengths[:, None]
            found = np.asarray(_log_likelihoods(opened.model, inputs, targets, valid))
        for i, one in enumerate(batch):
            yield found[i, one.scored : lengths[i]].tolist()


@jax.jit
def _log_likelihoods(model: Decoder, inputs: Array, targets: Array, valid: Array) -> Array:
    """Returns the float32 log-likelihood ``(B, L)`` of each target ``(B, L)``."""
    segments = valid.astype(jnp.int32)
    hidden, _ = model.hidden(inputs, segments, positions_of(segments), mode=DECODE)

    def of_part(part: tuple[Array, Array]) -> Array:
        logits = model.logits(part[0])
        chosen = jnp.take_along_axis(logits, part[1][..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    size = min(_CHUNK, inputs.shape[1])
    pad = -inputs.shape[1] % size
    split = functools.partial(_in_parts, pad=pad, size=size)
    parts = jax.lax.map(of_part, (split(hidden), split(targets)))
    return jnp.moveaxis(parts, 0, 1).reshape(inputs.shape[0], -1)[:, : inputs.shape[1]]


def _in_parts(array: Array, *, pad: int, size: int) -> Array:
    """Returns ``(B, L, ...)`` as parts ``(P, B, size, ...)``."""
    array = jnp.pad(array, ((0, 0), (0, pad), *[(0, 0)] * (array.ndim - 2)))
    parts = array.reshape(array.shape[0], -1, size, *array.shape[2:])
    return jnp.moveaxis(parts, 1, 0)


def require_causal(config: ModelConfig) -> None:
    """Rejects models that read later tokens, under which a text has no likelihood.

    Raises:
        ConfigError: If the model is an encoder or encoder-decoder, or experts choose tokens.
    """
    reason = ""
    if not isinstance(config, DecoderConfig):
        reason = "an encoder-decoder reads two texts"
    elif not config.causal:
        reason = "a model with model.causal=False reads later tokens"
    elif any(layer.moe.router.experts_choose for layer in config.sparse_layers()):
        reason = "experts choose among tokens, later ones included"
    if reason:
        raise ConfigError(
            f"this model gives a text no likelihood, since {reason}: use a decoder "
            "in which tokens choose experts"
        )


def _decoder(model: Model) -> Decoder:
    assert isinstance(model, Decoder)  # ``require_causal`` has checked its configuration.
    return model
