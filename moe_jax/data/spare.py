"""A tokenizer whose model has more rows in its embedding than the tokenizer has ids."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np

from moe_jax.data.tokenizer import Tokenizer

_FILE = "spare_ids.json"


@dataclasses.dataclass(frozen=True, eq=False)
class WithSpareIds:
    """Ids of `base`, and above them ids that stand for no text.

    Released models round the rows of their embedding up.

    Attributes:
        base: Encodes text, and never to a spare id.
        vocab_size: Number of ids, spare ones included.
    """

    base: Tokenizer
    vocab_size: int

    @property
    def pad_id(self) -> int:
        """See `Tokenizer`."""
        return self.base.pad_id

    @property
    def bos_id(self) -> int:
        """See `Tokenizer`."""
        return self.base.bos_id

    @property
    def eos_id(self) -> int:
        """See `Tokenizer`."""
        return self.base.eos_id

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """See `Tokenizer`; spare ids stand for no byte."""
        spare = np.zeros(self.vocab_size - self.base.vocab_size, np.int32)
        return np.append(self.base.byte_lengths, spare)

    def encode(self, text: str) -> np.ndarray:
        """See `Tokenizer`."""
        return self.base.encode(text)

    def encode_blanks(self, text: str) -> np.ndarray:
        """See `WithSentinels`, which the base must be."""
        return self.base.encode_blanks(text)

    def decode(self, ids: np.ndarray) -> str:
        """See `Tokenizer`; spare ids are skipped."""
        ids = np.asarray(ids, np.int64).ravel()
        return self.base.decode(ids[ids < self.base.vocab_size])

    def piece(self, token: int) -> str:
        """See `Tokenizer`."""
        return self.base.piece(token) if token < self.base.vocab_size else f"<spare_{token}>"

    def save(self, directory: str | Path) -> None:
        """See `Tokenizer`."""
        # First: a process killed here leaves no tokenizer, rather than one without spare ids.
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / _FILE).write_text(json.dumps({"vocab_size": self.vocab_size}) + "\n")
        self.base.save(directory)


def with_spare_ids(base: Tokenizer, rows: int) -> Tokenizer:
    """Returns `base` with spare ids up to `rows`, or as it is where it has as many."""
    return WithSpareIds(base, rows) if rows > base.vocab_size else base


def load_spare_ids(directory: str | Path, base: Tokenizer) -> Tokenizer:
    """Returns `base` with the spare ids that `WithSpareIds.save` wrote, if it did."""
    path = Path(directory) / _FILE
    if not path.is_file():
        return base
    return with_spare_ids(base, json.loads(path.read_text())["vocab_size"])


def without_spare_ids(tokenizer: Tokenizer) -> Tokenizer:
    """Returns the tokenizer below the spare ids."""
    return tokenizer.base if isinstance(tokenizer, WithSpareIds) else tokenizer
