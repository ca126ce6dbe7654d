"""A tokenizer with T5's sentinels above its own ids."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import ConfigError, line_of

FILE = "sentinels.json"
_BLANK = re.compile(r"<extra_id_(\d+)>")


@dataclasses.dataclass(frozen=True, eq=False)
class WithSentinels:
    """Ids of `base`, and above them `sentinels` more, `<extra_id_0>` the highest.

    Attributes:
        base: Encodes text, and never to a sentinel.
        sentinels: Their number.
    """

    base: Tokenizer
    sentinels: int

    @property
    def vocab_size(self) -> int:
        """See `Tokenizer`."""
        return self.base.vocab_size + self.sentinels

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
        """See `Tokenizer`; sentinels stand for no byte."""
        return np.append(self.base.byte_lengths, np.zeros(self.sentinels, np.int32))

    def encode(self, text: str) -> np.ndarray:
        """See `Tokenizer`; `<extra_id_0>` in a text is text."""
        return self.base.encode(text)

    def encode_blanks(self, text: str) -> np.ndarray:
        """Token ids of a text in which `<extra_id_i>` is the i-th sentinel.

        Raises:
            ValueError: There is no such sentinel.
        """
        ids: list[int] = []
        for place, part in enumerate(_BLANK.split(text)):
            ids += [self._sentinel(int(part))] if place % 2 else self.base.encode(part).tolist()
        return np.array(ids, np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """See `Tokenizer`; sentinels show as `<extra_id_i>`."""
        ids = np.asarray(ids, np.int64).ravel()
        first, *rest = np.split(ids, np.flatnonzero(ids >= self.base.vocab_size))
        parts = (self.piece(int(part[0])) + self.base.decode(part[1:]) for part in rest)
        return self.base.decode(first) + "".join(parts)

    def piece(self, token: int) -> str:
        """See `Tokenizer`."""
        if token < self.base.vocab_size:
            return self.base.piece(token)
        return f"<extra_id_{self.vocab_size - 1 - token}>"

    def save(self, directory: str | Path) -> None:
        """See `Tokenizer`."""
        # First: a process killed here leaves no tokenizer, rather than one without sentinels.
        path = tfds.core.Path(directory) / FILE
        path.write_text(json.dumps({"sentinels": self.sentinels}) + "\n")
        self.base.save(directory)

    def _sentinel(self, number: int) -> int:
        if number >= self.sentinels:
            raise ValueError(
                f"there is no <extra_id_{number}>: the last of {self.sentinels} sentinels is "
                f"<extra_id_{self.sentinels - 1}>."
            )
        return self.vocab_size - 1 - number


def load_sentinels(directory: str | Path, base: Tokenizer) -> Tokenizer:
    """Returns `base` with the sentinels that `WithSentinels.save` wrote, if it did.

    Raises:
        ConfigError: The file is damaged.
    """
    path = tfds.core.Path(directory) / FILE
    if not path.exists():
        return base
    try:
        return WithSentinels(base, int(json.loads(path.read_text())["sentinels"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is damaged ({line_of(error)}): it holds the run's data.spans.sentinels, as "
            '{"sentinels": 100}'
        ) from error
