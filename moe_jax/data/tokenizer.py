"""The protocol of a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np


class Tokenizer(Protocol):
    """A map from text to token ids and back."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        ...

    @property
    def pad_id(self) -> int:
        """Padding token, always 0."""
        ...

    @property
    def bos_id(self) -> int:
        """Begin token of a document."""
        ...

    @property
    def eos_id(self) -> int:
        """End token of a document."""
        ...

    @property
    def byte_lengths(self) -> np.ndarray:
        """Number of UTF-8 bytes of each id, (vocab_size,), int32; 0 for specials."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Returns the token ids of ``text``, (tokens,), int32, without specials."""
        ...

    def decode(self, ids: np.ndarray) -> str:
        """Inverts ``encode``; specials are skipped, broken UTF-8 becomes U+FFFD."""
        ...

    def piece(self, token: int) -> str:
        """Returns the displayed form of one token."""
        ...

    def save(self, directory: str | Path) -> None:
        """Writes the tokenizer into ``directory``, for ``load_tokenizer``."""
        ...


@runtime_checkable
class SeveralEnds(Protocol):
    """A tokenizer with several tokens that end a generated text."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that end a generated text; the first is ``eos_id``."""
        ...


def end_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the ids of the tokens that end a generated text, ``eos_id`` first."""
    return tokenizer.end_ids if isinstance(tokenizer, SeveralEnds) else (tokenizer.eos_id,)
