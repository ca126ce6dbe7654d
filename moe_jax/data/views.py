"""Parts and unions of sources: first documents, held-out documents, spans, joined sources."""

from __future__ import annotations

import dataclasses
import functools
import hashlib

import numpy as np

from moe_jax.data.source import Source
from moe_jax.errors import ConfigError

# A single document is cut into at least so many spans of equal length.
_FEWEST_SPANS = 100


@dataclasses.dataclass(frozen=True)
class FirstDocuments:
    """The first documents of a source.

    Attributes:
        source: Source of all documents.
        limit: Maximum number of documents.
    """

    source: Source
    limit: int

    @property
    def identity(self) -> str:
        """Identity of the documents."""
        return f"{self.source.identity}[:{self.limit}]"

    @property
    def size(self) -> int:
        """Number of bytes of the whole source."""
        return self.source.size

    def __len__(self) -> int:
        """Returns the number of documents."""
        return min(self.limit, len(self.source))

    def __getitem__(self, index: int) -> str:
        """Returns the text of document ``index``."""
        return self.source[_checked(index, len(self))]

    def domain(self, index: int) -> int:
        """Returns the domain that the whole source gives the document."""
        return self.source.domain(index)


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """One side of a split of a source: the documents held out for validation, or the others.

    One document in ``one_in`` is held out, at least one, at equal distances.

    Attributes:
        source: Source of all documents, at least two.
        one_in: Number of documents per held-out document.
        validation: Whether the documents are those held out.
    """

    source: Source
    one_in: int
    validation: bool

    @property
    def identity(self) -> str:
        """Identity of the documents."""
        side = "validation" if self.validation else "training"
        return f"{self.source.identity}/{side} of 1 in {self.one_in}"

    @property
    def size(self) -> int:
        """Approximate number of bytes of this side."""
        return self.source.size * len(self) // len(self.source)

    @functools.cached_property
    def _held(self) -> np.ndarray:
        return held_out(len(self.source), self.one_in)

    @functools.cached_property
    def _kept_before(self) -> np.ndarray:
        """Number of other documents before each held-out document, ascending."""
        return self._held - np.arange(len(self._held))

    def __len__(self) -> int:
        """Returns the number of documents."""
        return len(self._held) if self.validation else len(self.source) - len(self._held)

    def __getitem__(self, index: int) -> str:
        """Returns the text of document ``index``."""
        return self.source[self._number(index)]

    def domain(self, index: int) -> int:
        """Returns the domain that the whole source gives the document."""
        return self.source.domain(self._number(index))

    def _number(self, index: int) -> int:
        """Returns the number of a document in the whole source."""
        index = _checked(index, len(self))
        if self.validation:
            return int(self._held[index])
        return index + int(np.searchsorted(self._kept_before, index, side="right"))


@dataclasses.dataclass(frozen=True)
class SpanSource:
    """A single document cut into spans of equal length: some for validation, the others to train.

    Attributes:
        source: Source of the one document.
        one_in: Number of spans per span for validation.
        validation: Whether the documents are the validation spans; the training documents are the
            texts between them.
        name: Name of the document in messages.
    """

    source: Source
    one_in: int
    validation: bool
    name: str = ""

    @property
    def identity(self) -> str:
        """Identity of the documents."""
        side = "validation" if self.validation else "training"
        return f"{self.source.identity}/{self._spans} spans/{side} of 1 in {self.one_in}"

    @property
    def size(self) -> int:
        """Number of bytes of the document."""
        return self.source.size

    @property
    def spans(self) -> int:
        """Number of spans on this side of the split."""
        held = len(held_out(self._spans, self.one_in))
        return held if self.validation else self._spans - held

    @property
    def _spans(self) -> int:
        return max(_FEWEST_SPANS, self.one_in)

    @functools.cached_property
    def _documents(self) -> list[str]:
        text, count = self.source[0], self._spans
        if len(text) < count:
            raise ConfigError(
                f"{self.name} is the only document and has {len(text)} characters, too few to "
                f"split off validation text: give at least {count}, a second document, or "
                "data.eval_source"
            )
        chosen = held_out(count, self.one_in).tolist()
        cuts = [(n, n + 1) for n in chosen]
        if not self.validation:
            cuts = list(zip((0, *(n + 1 for n in chosen)), (*chosen, count), strict=True))
        return [text[a * len(text) // count : b * len(text) // count] for a, b in cuts]

    def __len__(self) -> int:
        """Returns the number of documents."""
        return len(self._documents)

    def __getitem__(self, index: int) -> str:
        """Returns the text of document ``index``."""
        return self._documents[index]

    def domain(self, index: int) -> int:
        """Returns the domain of the document."""
        del index
        return self.source.domain(0)


@dataclasses.dataclass(frozen=True)
class Joined:
    """The documents of several sources, one source after the other.

    Attributes:
        sources: The sources.
        numbered: Whether the domain of a document is the number of its source, from 0; otherwise
            it is the domain that the source gives.
    """

    sources: tuple[Source, ...]
    numbered: bool = False

    @property
    def identity(self) -> str:
        """Identity of the documents."""
        names = "\n".join(source.identity for source in self.sources)
        return f"joined/{hashlib.sha256(names.encode()).hexdigest()}"

    @property
    def size(self) -> int:
        """Approximate number of bytes of all documents."""
        return sum(source.size for source in self.sources)

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([len(source) for source in self.sources])

    def __len__(self) -> int:
        """Returns the number of documents."""
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> str:
        """Returns the text of document ``index``."""
        number, within = self._place(index)
        return self.sources[number][within]

    def domain(self, index: int) -> int:
        """Returns the domain of document ``index``, see ``numbered``."""
        number, within = self._place(index)
        return number if self.numbered else self.sources[number].domain(within)

    def _place(self, index: int) -> tuple[int, int]:
        """Returns the number of the source of a document, and its index there."""
        number = int(np.searchsorted(self._ends, _checked(index, len(self)), side="right"))
        return number, index - (int(self._ends[number - 1]) if number else 0)


def held_out(count: int, one_in: int) -> np.ndarray:
    """Returns the numbers that are held out of ``count``, ascending, at equal distances.

    Args:
        count: Number of documents or spans.
        one_in: Number of documents per held-out document; at least one document is held out.
    """
    held = max(1, count // one_in)
    # In integers: the middle of each of ``held`` equal parts.
    return (2 * np.arange(held, dtype=np.int64) + 1) * count // (2 * held)


def side(
    source: Source, one_in: int, validation: bool, name: str, *, divisible: bool = True
) -> Source:
    """Returns one side of a split, of documents or, if there is only one document, of its spans.

    Args:
        source: Source of all documents.
        one_in: Number of documents or spans per one for validation.
        validation: Whether to return the validation documents.
        name: Name of the source in messages.
        divisible: Whether a document can be cut into spans.

    Raises:
        ConfigError: There is only one document, and it cannot be cut.
    """
    if len(source) > 1:
        return HeldOut(source, one_in, validation)
    if not divisible:
        raise ConfigError(
            f"{name} holds only one dialogue, and none for validation: give a second one, or "
            "data.eval_source"
        )
    return SpanSource(source, one_in, validation, name)


def _checked(index: int, count: int) -> int:
    if not 0 <= index < count:
        raise IndexError(f"document {index} of {count}")
    return index
