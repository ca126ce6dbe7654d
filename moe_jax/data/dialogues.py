"""Instruction data: prompts with answers, and dialogues, of which only the answers are targets.

A document of instruction data is a JSON list of ``[role, text]`` (``moe_jax.data.formats``). The
tokens of a prompt are inputs alone; the tokens of an answer, and the end token after it, are inputs
and targets.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence

import numpy as np

from moe_jax.data.chat_template import ChatTemplate
from moe_jax.data.config import DataConfig
from moe_jax.data.hf_tokenizer import HFTokenizer
from moe_jax.data.source import Source
from moe_jax.data.sources import SPLITS, open_source
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import ConfigError

Messages = Sequence[Mapping[str, str]]

_ASSISTANT = "assistant"


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a document.

    Attributes:
        text: Text of the part.
        answer: Whether its tokens are targets.
        ends: Whether the end token follows it.
    """

    text: str
    answer: bool = False
    ends: bool = False


@dataclasses.dataclass(frozen=True)
class Dialogues:
    """Encodes documents of instruction data.

    Attributes:
        tokenizer: Tokenizer of the run.
        plain: Whether a document is a prompt and its answer, which follow each other unchanged;
            otherwise it is a dialogue in the chat template of the tokenizer.
    """

    tokenizer: Tokenizer
    plain: bool

    def encode(self, document: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the token ids ``(T,)`` int32 and the mask ``(T,)`` bool of the answers.

        The begin token and the last end token are left out, because rows have their own.

        Raises:
            ConfigError: The chat template cannot render the dialogue.
        """
        ids, answers = _encoded(self.tokenizer, self.pieces(document))
        bos, eos = self.tokenizer.bos_id, self.tokenizer.eos_id
        if len(ids) and ids[0] == bos != eos:
            ids, answers = ids[1:], answers[1:]
        if len(ids) and ids[-1] == eos:
            ids, answers = ids[:-1], answers[:-1]
        return ids, answers

    def pieces(self, document: str) -> list[Piece]:
        """Returns the pieces of a document; see ``encode`` for errors."""
        pairs = json.loads(document)
        if self.plain:
            return [Piece(text, role == _ASSISTANT) for role, text in pairs]
        messages = [{"role": role, "content": text} for role, text in pairs]
        template = template_of(self.tokenizer)
        return _own_pieces(messages) if template is None else _rendered(template, messages)


def chat_prompt(tokenizer: Tokenizer, messages: Messages) -> str:
    """Returns the text after which the model answers a dialogue.

    Args:
        tokenizer: Tokenizer, whose chat template is used; without one, a line ``<|role|>`` comes
            before each message.
        messages: Messages with ``role`` and ``content``.

    Raises:
        ConfigError: The chat template cannot render the dialogue.
    """
    template = template_of(tokenizer)
    if template is not None:
        text = template.render(messages, prompt=True)
        return text.removeprefix(template.bos_token)
    pieces = _own_pieces([*messages, {"role": _ASSISTANT, "content": ""}])
    return "".join(piece.text for piece in pieces)


def template_of(tokenizer: Tokenizer) -> ChatTemplate | None:
    """Returns the chat template of a released tokenizer, or ``None``."""
    inner = _innermost(tokenizer)
    if not isinstance(inner, HFTokenizer) or not inner.chat_template:
        return None
    bos, eos = inner.special(inner.bos_id), inner.special(inner.eos_id)
    return ChatTemplate(inner.chat_template, bos, eos)


def _innermost(tokenizer: Tokenizer) -> Tokenizer:
    while hasattr(tokenizer, "base"):
        tokenizer = tokenizer.base
    return tokenizer


def _own_pieces(messages: Messages) -> list[Piece]:
    """Returns the pieces of a dialogue for a tokenizer without a chat template."""
    pieces = []
    for number, message in enumerate(messages):
        answer = message["role"] == _ASSISTANT
        pieces.append(Piece(f"{chr(10) if number else ''}<|{message['role']}|>\n"))
        pieces.append(Piece(message["content"], answer, ends=answer))
    return pieces


def _rendered(template: ChatTemplate, messages: Messages) -> list[Piece]:
    """Returns the pieces of a dialogue in a chat template.

    An answer is what the template adds to the prompt that it renders for the messages before.
    """
    pieces, done = [], ""
    for number, message in enumerate(messages):
        if message["role"] != _ASSISTANT:
            continue
        before = template.render(messages[:number], prompt=True)
        after = template.render(messages[: number + 1], prompt=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise ConfigError(
                "the chat template of the tokenizer changes earlier messages when an answer "
                "follows, so answers cannot be told from prompts: write texts with "
                "data.prompt_feature instead"
            )
        pieces += [Piece(before[len(done) :]), Piece(after[len(before) :], answer=True)]
        done = after
    return pieces


def _encoded(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> tuple[np.ndarray, np.ndarray]:
    inner = _innermost(tokenizer)
    if isinstance(inner, HFTokenizer) and not any(piece.ends for piece in pieces):
        return _encoded_whole(inner, pieces)
    ids = []
    for piece in pieces:
        end = [tokenizer.eos_id] if piece.ends else []
        ids.append(np.append(tokenizer.encode(piece.text), end).astype(np.int32))
    answers = [np.full(len(part), piece.answer) for part, piece in zip(ids, pieces, strict=True)]
    return np.concatenate(ids), np.concatenate(answers)


def _encoded_whole(
    tokenizer: HFTokenizer, pieces: Sequence[Piece]
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes the whole text, since tokens depend on what is beside them.

    A token is of the piece in which it ends.
    """
    ids, ends = tokenizer.encode_with_ends("".join(piece.text for piece in pieces))
    borders = np.cumsum([len(piece.text) for piece in pieces])
    numbers = np.searchsorted(borders, np.maximum(ends - 1, 0), side="right")
    answers = np.array([piece.answer for piece in pieces])
    return ids, answers[np.minimum(numbers, len(pieces) - 1)]


@dataclasses.dataclass(frozen=True)
class PlainTexts:
    """The texts of documents of instruction data, without roles.

    Attributes:
        source: Source of the documents.
    """

    source: Source

    @property
    def identity(self) -> str:
        """Identity of the documents."""
        return f"{self.source.identity}/texts"

    @property
    def size(self) -> int:
        """Approximate number of bytes of all documents."""
        return self.source.size

    def __len__(self) -> int:
        """Returns the number of documents."""
        return len(self.source)

    def __getitem__(self, index: int) -> str:
        """Returns the texts of document ``index``, one after the other."""
        return "\n".join(text for _, text in json.loads(self.source[index]))

    def domain(self, index: int) -> int:
        """Returns the domain of document ``index``."""
        return self.source.domain(index)


def dialogues_of(config: DataConfig, tokenizer: Tokenizer) -> Dialogues | None:
    """Returns the encoder of instruction data; ``None`` for documents that are plain texts."""
    if config.messages_feature:
        return Dialogues(tokenizer, plain=False)
    return Dialogues(tokenizer, plain=True) if config.prompt_feature else None


def check_dialogues(config: DataConfig, tokenizer: Tokenizer) -> None:
    """Renders every dialogue once, so that a run finds one that the chat template rejects.

    Raises:
        ConfigError: The chat template rejects a dialogue; the message gives its number.
    """
    for name, part in config.parts.items():
        if part.messages_feature and template_of(tokenizer) is not None:
            for split in SPLITS:
                where = f"{name or part.source}, {split} dialogue"
                _check(open_source(part, split), Dialogues(tokenizer, plain=False), where)


def _check(source: Source, dialogues: Dialogues, where: str) -> None:
    for index in range(len(source)):
        try:
            dialogues.pieces(source[index])
        except ConfigError as error:
            raise ConfigError(f"{where} {index}: {error}") from error
