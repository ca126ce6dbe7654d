"""The protocol of a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np


class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
        vocab_size: Number of ids.
        pad_id: Padding, always 0.
        bos_id: Begins a document.
        eos_id: Ends a document.
        byte_lengths: (vocab_size,) int32, UTF-8 bytes that each id stands for; 0 for specials.
    """

    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    byte_lengths: np.ndarray

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, (tokens,) int32, without specials."""
        ...

    def decode(self, ids: np.ndarray) -> str:
        """Inverse of `encode`; specials are skipped, broken UTF-8 shows as U+FFFD."""
        ...

    def piece(self, token: int) -> str:
        """How to show one token to a person."""
        ...

    def save(self, directory: str | Path) -> None:
        """Writes the tokenizer into `directory`, for `load_tokenizer`."""
        ...
