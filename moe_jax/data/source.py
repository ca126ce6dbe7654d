"""The protocol of a source of documents."""

from __future__ import annotations

from typing import Protocol


class Source(Protocol):
    """Documents with random access."""

    @property
    def identity(self) -> str:
        """Identity of the documents; two sources with one identity hold the same text."""
        ...

    @property
    def size(self) -> int:
        """Approximate number of bytes of all documents."""
        ...

    def __len__(self) -> int:
        """Returns the number of documents."""
        ...

    def __getitem__(self, index: int) -> str:
        """Returns the text of document ``index``, 0 <= index < len."""
        ...

    def domain(self, index: int) -> int:
        """Returns the language or topic of document ``index``; 0 if the corpus has none."""
        ...
