"""Tokenizers with further ids above the ids of another tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from moe_jax.data.directory import write_parts
from moe_jax.data.tokenizer import Tokenizer, end_ids
from moe_jax.errors import ConfigError, line_of


@dataclasses.dataclass(frozen=True, eq=False)
class Wrapped:
    """A tokenizer with ids above the ids of ``base``; these ids stand for no byte.

    A subclass defines ``vocab_size``, ``num_above`` and ``piece_above``.

    Attributes:
        base: Tokenizer of texts; it encodes no text to an id above its own ids.
    """

    base: Tokenizer

    @property
    def pad_id(self) -> int:
        """See ``Tokenizer``."""
        return self.base.pad_id

    @property
    def bos_id(self) -> int:
        """See ``Tokenizer``."""
        return self.base.bos_id

    @property
    def eos_id(self) -> int:
        """See ``Tokenizer``."""
        return self.base.eos_id

    @property
    def end_ids(self) -> tuple[int, ...]:
        """See ``SeveralEnds``."""
        return end_ids(self.base)

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """See ``Tokenizer``; ids above the ids of ``base`` stand for no byte."""
        return np.append(self.base.byte_lengths, np.zeros(self.num_above(), np.int32))

    def encode(self, text: str) -> np.ndarray:
        """See ``Tokenizer``; the displayed form of an id above ``base`` is plain text."""
        return self.base.encode(text)

    def piece(self, token: int) -> str:
        """See ``Tokenizer``."""
        return self.base.piece(token) if token < self.base.vocab_size else self.piece_above(token)

    def num_above(self) -> int:
        """Returns the number of ids above the ids of ``base``."""
        raise NotImplementedError

    def piece_above(self, token: int) -> str:
        """Returns the displayed form of an id above the ids of ``base``."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class NumberFile:
    """A JSON file with one number, beside the files of the wrapped tokenizer.

    Attributes:
        name: Name of the file.
        key: JSON key of the number.
        meaning: Description of the number, for a person who restores a damaged file.
    """

    name: str
    key: str
    meaning: str

    def write(self, directory: str | Path, number: int) -> None:
        """Writes the file; written before the base, it leaves no partial tokenizer after a kill."""
        content = json.dumps({self.key: number}) + "\n"
        write_parts(tfds.core.Path(directory) / self.name, [content.encode()])

    def read(self, directory: str | Path) -> int | None:
        """Returns the number, or ``None`` if there is no such file.

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
