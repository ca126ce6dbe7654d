"""Tokenizers with ids above those of another tokenizer, which no text is encoded to."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from moe_jax.data.directory import write_parts
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import ConfigError, line_of


@dataclasses.dataclass(frozen=True, eq=False)
class Wrapped:
    """Ids of `base`, and above them ids that stand for no byte. A subclass gives `vocab_size`.

    Attributes:
        base: Encodes text, and never to an id above its own.
    """

    base: Tokenizer

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
        """See `Tokenizer`; ids above those of `base` stand for no byte."""
        above = np.zeros(self.vocab_size - self.base.vocab_size, np.int32)
        return np.append(self.base.byte_lengths, above)

    def encode(self, text: str) -> np.ndarray:
        """See `Tokenizer`; how an id above those of `base` is shown is text like any other."""
        return self.base.encode(text)

    def piece(self, token: int) -> str:
        """See `Tokenizer`."""
        return self.base.piece(token) if token < self.base.vocab_size else self.piece_above(token)

    def piece_above(self, token: int) -> str:
        """How to show an id above those of `base` to a person."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class NumberFile:
    """A JSON file with one number, beside the tokenizer that it wraps.

    Attributes:
        name: Of the file.
        key: Of the number.
        meaning: What a person who restores the file has to know.
    """

    name: str
    key: str
    meaning: str

    def write(self, directory: str | Path, number: int) -> None:
        """Writes the file, before the tokenizer: a process killed between leaves no tokenizer."""
        content = json.dumps({self.key: number}) + "\n"
        write_parts(tfds.core.Path(directory) / self.name, [content.encode()])

    def read(self, directory: str | Path) -> int | None:
        """The number, or `None` where there is no such file.

        Raises:
            ConfigError: The file is damaged.
        """
        path = tfds.core.Path(directory) / self.name
        if not path.exists():
            return None
        try:
            return int(json.loads(path.read_text())[self.key])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is damaged ({line_of(error)}): {self.meaning}") from error
