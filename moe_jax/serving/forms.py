"""Answers as OpenAI writes them: completions and chats, whole and in parts."""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from moe_jax.data import Tokenizer
from moe_jax.serving.request import Token
from moe_jax.serving.written import TextPart

Json = dict[str, Any]
DONE = "data: [DONE]\n\n"


def event(content: Json) -> str:
    """Returns a server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


def usage(prompt: int, sampled: int) -> Json:
    """Returns the numbers of tokens of a request."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": sampled,
        "total_tokens": prompt + sampled,
    }


class Form(Protocol):
    """The parts of a response that completions and chats write in two ways."""

    def head(self, *, stream: bool) -> Json:
        """Returns the fields that all parts of an answer share."""

    def first(self) -> Json | None:
        """Returns the choice before the first token of a stream, if there is one."""

    def choice(self, part: TextPart, *, stream: bool) -> Json:
        """Returns the choice that holds a part, or the whole answer."""


@dataclasses.dataclass(frozen=True)
class _Base:
    """An answer.

    Attributes:
        model: Name of the model.
        tokenizer: Tokenizer of the model.
        logprobs: Whether the client asked for log-probabilities.
        identity: Random part of the id.
        created: Time in seconds.
    """

    model: str
    tokenizer: Tokenizer
    logprobs: bool
    identity: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def _head(self, prefix: str, kind: str) -> Json:
        return {
            "id": f"{prefix}-{self.identity}",
            "object": kind,
            "created": self.created,
            "model": self.model,
        }

    def _ranked(self, token: Token) -> list[tuple[str, float]]:
        return [(self.tokenizer.piece(number), logprob) for number, logprob in token.top]


class Completion(_Base):
    """The form of ``/v1/completions``."""

    def head(self, *, stream: bool) -> Json:
        """See ``Form``."""
        return self._head("cmpl", "text_completion")

    def first(self) -> Json | None:
        """See ``Form``."""
        return None

    def choice(self, part: TextPart, *, stream: bool) -> Json:
        """See ``Form``."""
        logprobs = self._logprobs(part) if self.logprobs else None
        return {
            "index": 0,
            "text": part.text,
            "logprobs": logprobs,
            "finish_reason": part.reason,
        }

    def _logprobs(self, part: TextPart) -> Json:
        return {
            "tokens": [self.tokenizer.piece(token.token) for token in part.tokens],
            "token_logprobs": [token.logprob for token in part.tokens],
            "top_logprobs": [dict(self._ranked(token)) for token in part.tokens],
            "text_offset": list(part.offsets),
        }


class Chat(_Base):
    """The form of ``/v1/chat/completions``."""

    def head(self, *, stream: bool) -> Json:
        """See ``Form``."""
        return self._head("chatcmpl", "chat.completion.chunk" if stream else "chat.completion")

    def first(self) -> Json | None:
        """See ``Form``."""
        delta = {"role": "assistant", "content": ""}
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}

    def choice(self, part: TextPart, *, stream: bool) -> Json:
        """See ``Form``."""
        text: Json = {"content": part.text}
        message = {"message": {"role": "assistant", **text, "refusal": None}}
        said = {"delta": text if part.text else {}} if stream else message
        logprobs = {"content": [*map(self._logprob, part.tokens)]} if self.logprobs else None
        return {"index": 0, **said, "logprobs": logprobs, "finish_reason": part.reason}

    def _logprob(self, token: Token) -> Json:
        top = [_named(*pair) for pair in self._ranked(token)]
        return {**_named(self.tokenizer.piece(token.token), token.logprob), "top_logprobs": top}


def _named(piece: str, logprob: float) -> Json:
    return {"token": piece, "logprob": logprob, "bytes": None}


def whole(parts: Sequence[TextPart]) -> TextPart:
    """Returns the parts of an answer as one part."""
    return TextPart(
        "".join(part.text for part in parts),
        tuple(token for part in parts for token in part.tokens),
        tuple(offset for part in parts for offset in part.offsets),
        parts[-1].reason,
    )
