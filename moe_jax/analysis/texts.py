"""Texts as a model reads them: batches of documents, and the tokens that each stack reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from moe_jax.analysis.forward import Batch
from moe_jax.decoding import positions_of


@dataclasses.dataclass(frozen=True)
class Text:
    """Token ids that a model reads of one document.

    Attributes:
        tokens: Token ids of the decoder, or of the only stack.
        source: Token ids of the encoder in front of a decoder; empty without one.
    """

    tokens: Sequence[int]
    source: Sequence[int] = ()


def batches_of(texts: Sequence[Text], size: int) -> Iterator[tuple[int, Batch]]:
    """Yields the number of the first document and the batch of ``size`` documents."""
    length = max(len(one.tokens) for one in texts)
    longest = max(len(one.source) for one in texts)
    for start in range(0, len(texts), size):
        yield start, batch_of(texts[start : start + size], size, length, longest)


def batch_of(texts: Sequence[Text], size: int, length: int, longest: int = 0) -> Batch:
    """Returns padded texts as the fields of a batch.

    Args:
        texts: At most ``size`` texts.
        size: Number ``B`` of rows.
        length: Number of tokens of a row.
        longest: Number of tokens of a source; 0 for texts without a source.
    """
    inputs, segments = _padded([one.tokens for one in texts], size, length)
    batch = {"inputs": inputs, "segments": segments, "positions": positions_of(segments)}
    if not longest:
        return batch
    source, around = _padded([one.source for one in texts], size, longest)
    return {**batch, "encoder_inputs": source, "encoder_segments": around}


def read_by(batch: Batch) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns token ids and mask ``(B, L)`` of the tokens of each stack, the encoder first."""
    names = ["encoder_", ""] if "encoder_inputs" in batch else [""]
    return [
        (np.asarray(batch[f"{name}inputs"]), np.asarray(batch[f"{name}segments"]) > 0)
        for name in names
    ]


def _padded(
    rows: Sequence[Sequence[int]], size: int, length: int
) -> tuple[Int[Array, "B L"], Int[Array, "B L"]]:
    """Returns token ids and segments; a segment of 0 is padding."""
    ids, segments = np.zeros((2, size, length), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)], segments[i, : len(row)] = row, 1
    return jnp.asarray(ids), jnp.asarray(segments)
