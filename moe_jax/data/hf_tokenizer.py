"""Released tokenizers: a ``tokenizer.json``, read by the optional package ``tokenizers``."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.errors import ConfigError, line_of

PREFIX = "hf:"
FILE = "hf_tokenizer.json"
_RELEASED = "tokenizer.json"
_TEMPLATE = "chat_template.jinja"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "\u2581"


@dataclasses.dataclass(frozen=True, eq=False)
class HFTokenizer:
    """A tokenizer of ``transformers``; decoding need not restore every text unchanged.

    Attributes:
        text: Content of the ``tokenizer.json``.
        vocab_size: Number of ids, added tokens included.
        pad_id: Padding token; 0 if the release names none.
        bos_id: Begin token of a document; the end token if the release names none.
        eos_id: End token of a document.
        chat_template: Jinja template of dialogues; "" if the release has none.
        more_ends: Ids that end a generated text too, from the settings of the release.
    """

    text: str
    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    chat_template: str = ""
    more_ends: tuple[int, ...] = ()

    @property
    def end_ids(self) -> tuple[int, ...]:
        """See ``SeveralEnds``."""
        return tuple(dict.fromkeys((self.eos_id, *self.more_ends)))

    @property
    def model(self) -> bytes:
        """Content of the tokenizer, which ``same_tokenizer`` compares."""
        return self.text.encode("utf-8")

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """See ``Tokenizer``; a space that the tokenizer adds before a text counts as one byte."""
        pieces = [self._inner.id_to_token(i) or "" for i in range(self.vocab_size)]
        plain = _plain_length(self.text)
        lengths = np.array([plain(piece) for piece in pieces], np.int32)
        specials = [i for i in _special_ids(self._inner) if i < self.vocab_size]
        lengths[[*specials, self.pad_id, self.bos_id, self.eos_id]] = 0
        return lengths

    def encode(self, text: str) -> np.ndarray:
        """See ``Tokenizer``."""
        return np.asarray(self._inner.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_with_ends(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the token ids of ``text`` and where each token ends, (tokens,) each, int32.

        An end is the number of characters of ``text`` up to the last character of the token.
        """
        found = self._inner.encode(text, add_special_tokens=False)
        return np.asarray(found.ids, np.int32), np.array([b for _, b in found.offsets], np.int32)

    def special(self, token: int) -> str:
        """Returns the text of a special token."""
        return self._inner.id_to_token(int(token)) or ""

    def decode(self, ids: np.ndarray) -> str:
        """See ``Tokenizer``; specials are skipped."""
        valid = [int(i) for i in np.asarray(ids).ravel() if 0 <= i < self.vocab_size]
        return self._inner.decode(valid, skip_special_tokens=True)

    def piece(self, token: int) -> str:
        """See ``Tokenizer``."""
        return self._inner.decode([int(token)], skip_special_tokens=False)

    def save(self, directory: str | Path) -> None:
        """See ``Tokenizer``."""
        path = Path(directory) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(dataclasses.asdict(self)) + "\n", encoding="utf-8")
        temporary.replace(path)

    @functools.cached_property
    def _inner(self) -> Any:
        try:
            inner = library().Tokenizer.from_str(self.text)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"the tokenizer.json cannot be read: {line_of(error)}") from error
        inner.no_padding()
        inner.no_truncation()
        return inner


def is_hf(setting: str) -> bool:
    """Returns whether ``data.tokenizer`` names a released tokenizer."""
    return setting.startswith(PREFIX)


def check_hf(setting: str) -> None:
    """Rejects a folder without a tokenizer, and a machine without the package ``tokenizers``.

    Raises:
        ConfigError: The file or the package is missing; the message names the remedy.
    """
    library()
    folder = _folder(setting)
    if not (folder / _RELEASED).is_file():
        others = [name for name in ("tokenizer.model", "spiece.model") if (folder / name).exists()]
        remedy = (
            f"{others[0]} alone cannot be read: write {_RELEASED} with transformers, by "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            if others
            else "give the folder of a released model, or another data.tokenizer"
        )
        raise ConfigError(f"data.tokenizer={setting!r}: {folder} holds no {_RELEASED}; {remedy}")


def open_hf(setting: str, sentinels: int = 0) -> HFTokenizer:
    """Opens ``hf:FOLDER``.

    Args:
        setting: Value of ``data.tokenizer``.
        sentinels: Number of sentinels that the caller adds above. If the highest ids of the release
            are as many sentinels (T5: ``<extra_id_0>`` is the highest id), they are left out here,
            so that the caller restores them under their ids.

    Raises:
        ConfigError: The tokenizer cannot be read, or it names no end token.
    """
    check_hf(setting)
    folder = _folder(setting)
    text = (folder / _RELEASED).read_text(encoding="utf-8")
    inner = HFTokenizer(text, 0, 0, 0, 0)._inner
    ids = inner.get_vocab(with_added_tokens=True)
    size = max(ids.values(), default=-1) + 1
    released = [ids.get(f"<extra_id_{i}>") for i in range(sentinels)]
    if sentinels and released == [size - 1 - i for i in range(sentinels)]:
        size -= sentinels
    named = _named_ids(folder, ids)
    eos = named["eos"]
    if eos is None:
        raise ConfigError(
            f"data.tokenizer={setting!r} names no end token: set eos_token in "
            f"{folder / 'tokenizer_config.json'}"
        )
    bos = eos if named["bos"] is None else named["bos"]
    pad, template = named["pad"] or 0, _chat_template(folder)
    return HFTokenizer(text, size, pad, bos, eos, template, _released_ends(folder))


def load_hf(directory: str | Path) -> HFTokenizer | None:
    """Reads the file of ``HFTokenizer.save``; returns ``None`` if there is no such file.

    Raises:
        ConfigError: The file is damaged.
    """
    path = Path(directory) / FILE
    if not path.is_file():
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return HFTokenizer(**{**saved, "more_ends": tuple(saved.get("more_ends", ()))})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is damaged: {line_of(error)}") from error


def library() -> Any:
    """Returns the package ``tokenizers``.

    Raises:
        ConfigError: The package is missing.
    """
    try:
        return importlib.import_module("tokenizers")
    except ImportError as error:
        raise ConfigError(
            "a tokenizer.json needs the package tokenizers: pip install tokenizers"
        ) from error


def _folder(setting: str) -> Path:
    return Path(setting.removeprefix(PREFIX)).expanduser()


def _named_ids(folder: Path, ids: dict[str, int]) -> dict[str, int | None]:
    """Returns the id of each special token, from the first file that names it."""
    texts = [_json(folder / f) for f in ("tokenizer_config.json", "special_tokens_map.json")]
    numbers = [_json(folder / f) for f in ("generation_config.json", "config.json")]
    numbers += [settings.get("text_config") or {} for settings in numbers]
    chosen = {}
    for kind in ("bos", "eos", "pad"):
        tokens = [_content(settings.get(f"{kind}_token")) for settings in texts]
        known = [ids[token] for token in tokens if token in ids]
        given = [_first(settings.get(f"{kind}_token_id")) for settings in numbers]
        known += [number for number in given if number is not None]
        chosen[kind] = known[0] if known else None
    return chosen


def _released_ends(folder: Path) -> tuple[int, ...]:
    """Returns the end tokens of the first settings that name some, as ``transformers`` does.

    Raises:
        ConfigError: The settings name an end token that is no id.
    """
    for path in (folder / "generation_config.json", folder / "config.json"):
        settings = _json(path)
        for part in (settings, settings.get("text_config") or {}):
            named = part.get("eos_token_id")
            ends = named if isinstance(named, list) else [] if named is None else [named]
            if not all(type(each) is int and each >= 0 for each in ends):
                raise ConfigError(f"{path}: eos_token_id={named!r} must be a token id or a list")
            if ends:
                return tuple(ends)
    return ()


def _chat_template(folder: Path) -> str:
    """Returns the chat template of a release, or "" if it has none."""
    path = folder / _TEMPLATE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = _json(folder / "tokenizer_config.json").get("chat_template") or ""
    if isinstance(found, list):
        named = {item.get("name"): item.get("template", "") for item in found}
        return named.get("default", "")
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _first(number: Any) -> int | None:
    return (number or [None])[0] if isinstance(number, list) else number


def _special_ids(inner: Any) -> list[int]:
    added = inner.get_added_tokens_decoder()
    return [number for number, token in added.items() if token.special]


def _plain_length(text: str) -> Callable[[str], int]:
    """Returns a function from a piece to the number of its UTF-8 bytes.

    In a byte-level vocabulary each character of a piece is one byte. Elsewhere, the decoder
    replaces characters that stand for others, such as U+2581 for a space.
    """
    parsed = json.loads(text)
    decoder = parsed.get("decoder") or {}
    if '"ByteLevel"' in json.dumps([parsed.get("pre_tokenizer"), decoder]):
        return len
    steps = [step for step in decoder.get("decoders", [decoder]) if step.get("type") == "Replace"]
    replaced = {_SPACE: " "}
    replaced |= {step["pattern"].get("String", _SPACE): step["content"] for step in steps}

    def length(piece: str) -> int:
        if _BYTE.fullmatch(piece):
            return 1
        for old, new in replaced.items():
            piece = piece.replace(old, new)
        return len(piece.encode("utf-8"))

    return length
