"""Tokenizers with the sentinels of T5 above the ids of another tokenizer."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np

from moe_jax.data.tokenizer import Tokenizer
from moe_jax.data.wrapped import NumberFile, Wrapped

_FILE = NumberFile(
    "sentinels.json",
    "sentinels",
    'it holds the run\'s data.spans.sentinels, as {"sentinels": 100}',
)
_BLANK = re.compile(r"<extra_id_(\d+)>")


@dataclasses.dataclass(frozen=True, eq=False)
class WithSentinels(Wrapped):
    """A tokenizer with sentinels above the ids of ``base``; ``<extra_id_0>`` is the highest id.

    Attributes:
        base: Tokenizer of texts; it encodes no text to a sentinel.
        sentinels: Number of sentinels.
    """

    sentinels: int

    @property
    def vocab_size(self) -> int:
        """See ``Tokenizer``."""
        return self.base.vocab_size + self.sentinels

    def encode_blanks(self, text: str) -> np.ndarray:
        """Encodes a text, with each ``<extra_id_i>`` as the i-th sentinel.

        Returns:
            Token ids, (tokens,), int32.

        Raises:
            ValueError: The text has a sentinel that the tokenizer lacks.
        """
        ids: list[int] = []
        for number, part in enumerate(_BLANK.split(text)):
            ids += [self._sentinel(int(part))] if number % 2 else self.base.encode(part).tolist()
        return np.array(ids, np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """See ``Tokenizer``; sentinels show as ``<extra_id_i>``."""
        ids = np.asarray(ids, np.int64).ravel()
        first, *rest = np.split(ids, np.flatnonzero(ids >= self.base.vocab_size))
        parts = (self.piece(int(part[0])) + self.base.decode(part[1:]) for part in rest)
        return self.base.decode(first) + "".join(parts)

    def num_above(self) -> int:
        """See ``Wrapped``."""
        return self.sentinels

    def piece_above(self, token: int) -> str:
        """See ``Wrapped``."""
        return f"<extra_id_{self.vocab_size - 1 - token}>"

    def save(self, directory: str | Path) -> None:
        """See ``Tokenizer``."""
        _FILE.write(directory, self.sentinels)
        self.base.save(directory)

    def _sentinel(self, number: int) -> int:
        if number >= self.sentinels:
            raise ValueError(
                f"there is no <extra_id_{number}>: the last of {self.sentinels} sentinels is "
                f"<extra_id_{self.sentinels - 1}>."
            )
        return self.vocab_size - 1 - number


def load_sentinels(directory: str | Path, base: Tokenizer) -> Tokenizer:
    """Returns ``base`` with the saved sentinels, or ``base`` itself if none were saved.

    Raises:
        ConfigError: The file is damaged.
    """
    sentinels = _FILE.read(directory)
    return base if sentinels is None else WithSentinels(base, sentinels)
