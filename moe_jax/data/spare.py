"""Tokenizers of models with more embedding rows than token ids."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from moe_jax.data.sentinels import WithSentinels
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.data.wrapped import NumberFile, Wrapped

_FILE = NumberFile(
    "spare_ids.json",
    "vocab_size",
    'it holds the rows of the model\'s embedding, as {"vocab_size": 32000}',
)


@dataclasses.dataclass(frozen=True, eq=False)
class WithSpareIds(Wrapped):
    """A tokenizer with spare ids above the ids of ``base``; a spare id stands for no text.

    Released models round the number of rows of their embedding up.

    Attributes:
        base: Tokenizer of texts; it encodes no text to a spare id.
        vocab_size: Number of ids, spare ids included.
    """

    vocab_size: int

    def encode_blanks(self, text: str) -> np.ndarray:
        """See ``WithSentinels``.

        Raises:
            TypeError: The base has no sentinels.
        """
        if not isinstance(self.base, WithSentinels):
            raise TypeError("the tokenizer has no sentinels: the model restores no spans")
        return self.base.encode_blanks(text)

    def decode(self, ids: np.ndarray) -> str:
        """See ``Tokenizer``; spare ids are skipped."""
        ids = np.asarray(ids, np.int64).ravel()
        return self.base.decode(ids[ids < self.base.vocab_size])

    def num_above(self) -> int:
        """See ``Wrapped``."""
        return self.vocab_size - self.base.vocab_size

    def piece_above(self, token: int) -> str:
        """See ``Wrapped``."""
        return f"<spare_{token}>"

    def save(self, directory: str | Path) -> None:
        """See ``Tokenizer``."""
        _FILE.write(directory, self.vocab_size)
        self.base.save(directory)


def with_spare_ids(base: Tokenizer, rows: int) -> Tokenizer:
    """Returns ``base`` with spare ids up to ``rows``, or ``base`` itself if none are missing."""
    return WithSpareIds(base, rows) if rows > base.vocab_size else base


def load_spare_ids(directory: str | Path, base: Tokenizer) -> Tokenizer:
    """Returns ``base`` with the saved spare ids, or ``base`` itself if none were saved.

    Raises:
        ConfigError: The file is damaged.
    """
    return with_spare_ids(base, _FILE.read(directory) or 0)


def without_spare_ids(tokenizer: Tokenizer) -> Tokenizer:
    """Returns the tokenizer below the spare ids."""
    return tokenizer.base if isinstance(tokenizer, WithSpareIds) else tokenizer
