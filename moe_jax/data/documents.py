"""Documents of one file: a text file is one document, a JSON Lines file has one in each line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from moe_jax.errors import ConfigError

_LINES = (".jsonl", ".ndjson")


def read_documents(file: Path, field: str = "text") -> Iterator[str]:
    """Yields the documents of a file.

    Args:
        file: UTF-8 text, or JSON Lines if its name ends in ``.jsonl`` or ``.ndjson``.
        field: Field of each JSON line that holds the text.

    Raises:
        ConfigError: If the file does not exist or is not UTF-8, or a line has no such text.
    """
    if not file.is_file():
        raise ConfigError(f"{file} is not a file: give a text file or a .jsonl file")
    try:
        if file.suffix not in _LINES:
            yield file.read_text(encoding="utf-8")
            return
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _text_of(line, field, f"{file} line {number}")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text ({error.reason}): convert it") from error


def _text_of(line: str, field: str, where: str) -> str:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON ({error})") from error
    text = found.get(field) if isinstance(found, dict) else None
    if not isinstance(text, str):
        fields = ", ".join(found) if isinstance(found, dict) else "none"
        raise ConfigError(f"{where} has no text in field {field!r}; its fields: {fields}")
    return text
