"""Rows of files with many documents: JSON lines, compressed or not, and Parquet."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moe_jax.data.config import DataConfig
from moe_jax.errors import ConfigError, line_of

Row = Mapping[str, Any]

_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
_PARQUET = (".parquet",)
_BATCH = 256


@dataclasses.dataclass(frozen=True)
class Fields:
    """The fields of a row that form a document.

    Attributes:
        text: Field with the text, or with the answer to ``prompt``.
        prompt: Field with the prompt of instruction data; "" for plain text.
        messages: Field with the messages of a dialogue, in place of the others; "" for none.
    """

    text: str
    prompt: str = ""
    messages: str = ""

    @classmethod
    def of(cls, config: DataConfig) -> Fields:
        """Returns the fields that a data config names."""
        return cls(config.text_feature, config.prompt_feature, config.messages_feature)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the fields."""
        if self.messages:
            return (self.messages,)
        return (self.prompt, self.text) if self.prompt else (self.text,)

    def document(self, row: Row, where: str) -> str:
        """Returns the document of a row: a text, or JSON ``[[role, text], ...]``.

        Raises:
            ConfigError: A field holds no text, or a dialogue is malformed; the message begins with
                ``where``.
        """
        if self.messages:
            return _dialogue(row[self.messages], f"{where}: the field {self.messages!r}")
        text = text_of(row, self.text, where)
        if not self.prompt:
            return text
        prompt = text_of(row, self.prompt, where)
        return json.dumps([["user", prompt], ["assistant", text]]) if text else ""


def _dialogue(messages: Any, where: str) -> str:
    """Returns a dialogue, a list of ``{"role": ..., "content": ...}``, as JSON."""
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise ConfigError(f"{where} holds no list of messages (set data.messages_feature)")
    for one in messages:
        check_fields(one, ("role", "content"), f"{where}, a message")
    pairs = [[text_of(one, key, where) for key in ("role", "content")] for one in messages]
    if not any(role == "assistant" for role, _ in pairs):
        raise ConfigError(f"{where} holds no message with the role assistant, so nothing to learn")
    return json.dumps(pairs)


def has_rows(path: str) -> bool:
    """Returns whether a file has many documents, by the end of its name."""
    return path.endswith((*_LINES, *_PARQUET))


def rows(path: str, fields: Sequence[str]) -> Iterator[Row]:
    """Yields the rows of a file.

    Args:
        path: Path of the file, which ends in ``.jsonl``, ``.jsonl.gz``, ``.jsonl.zst``,
            ``.json.gz``, ``.json.zst`` or ``.parquet``.
        fields: Names of the fields to read; each row has them.

    Raises:
        ConfigError: The file cannot be read, a line is not a JSON object, or a field is missing;
            the message names the file and the line or the known fields.
    """
    try:
        yield from (_parquet if path.endswith(_PARQUET) else _lines)(path, fields)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(
            f"{path} cannot be read ({line_of(error)}): repair it, or leave it out of data.source"
        ) from error


def _lines(path: str, fields: Sequence[str]) -> Iterator[Row]:
    # pyarrow takes the compression from the end of the name.
    with io.BufferedReader(pa.input_stream(path)) as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield _row(line, fields, f"{path}, line {number}")


def _row(line: bytes, fields: Sequence[str], where: str) -> Row:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where} is not UTF-8 text (byte {error.start}); convert it") from error
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON ({line_of(error)}); correct it") from error
    if not isinstance(row, dict):
        raise ConfigError(f"{where} is not a JSON object; write one object per line")
    check_fields(row, fields, where)
    return row


def _parquet(path: str, fields: Sequence[str]) -> Iterator[Row]:
    with pq.ParquetFile(path) as file:
        check_fields(file.schema_arrow.names, fields, path)
        for batch in file.iter_batches(batch_size=_BATCH, columns=list(fields)):
            yield from batch.to_pylist()


def check_fields(known: Sequence[str] | Row, fields: Sequence[str], where: str) -> None:
    """Rejects rows that lack a field.

    Raises:
        ConfigError: If so; the message lists the fields that exist.
    """
    missing = [field for field in fields if field not in known]
    if missing:
        raise ConfigError(
            f"{where} has no field {missing[0]!r}; it has {', '.join(sorted(known))} (set "
            "data.text_feature)"
        )


def text_of(row: Row, field: str, where: str) -> str:
    """Returns the text in a field of a row.

    Raises:
        ConfigError: The value is no text, or it is binary.
    """
    value = row[field]
    if not isinstance(value, str):
        raise ConfigError(
            f"{where}: the field {field!r} holds {type(value).__name__} and not text (set "
            "data.text_feature)"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{where}: the field {field!r} is not Unicode text ({error.reason})"
        ) from error
    if "\0" in value:
        raise ConfigError(f"{where}: the field {field!r} holds binary data and not text")
    return value
