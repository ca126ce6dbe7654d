"""Text of sampled tokens, part by part: whole characters, and an end before a stop text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from moe_jax.data import Tokenizer
from moe_jax.serving.request import Ended, Token

_BROKEN = "\ufffd"
# A tokenizer decodes up to three bytes of an unfinished character to as many replacements.
_MOST_BROKEN = 3


class Detokenizer:
    """Text of tokens, in parts that never change again.

    A part ends at a whole character. The tokens of the last part are decoded again with new ones,
    since a tokenizer may drop the space before the first token.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids = list[int]()
        self._last = 0  # index of the first token of the last part
        self._shown = 0  # characters of the decoded tokens that are parts already

    def push(self, token: int) -> str:
        """Returns the text that a token completes."""
        self._ids.append(token)
        text = self._text()
        broken = len(text) - len(text.rstrip(_BROKEN))
        part = text[self._shown : len(text) - min(broken, _MOST_BROKEN)]
        self._shown += len(part)
        if part and not broken:
            self._ids, self._last = self._ids[self._last :], len(self._ids) - self._last
            self._shown = len(self._text())
        return part

    def rest(self) -> str:
        """Returns the text after the last part; a broken character becomes U+FFFD."""
        return self._text()[self._shown :]

    def _text(self) -> str:
        return self._tokenizer.decode(np.array(self._ids, np.int32))


class Stops:
    """Search for stop texts in a text that comes in parts."""

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Returns the text that no stop text can include, and True if a stop text follows it."""
        text = self._held + text
        found = [at for at in map(text.find, self._stops) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def rest(self) -> str:
        """Returns the text that might have begun a stop text."""
        return self._held


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of ``text`` that begins ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


@dataclasses.dataclass(frozen=True)
class TextPart:
    """A part of an answer.

    Attributes:
        text: Text that the part adds.
        tokens: Sampled tokens of the part, without the end token.
        offsets: Number of characters of the decoded text before each token.
        reason: OpenAI's name of the reason for the end, if this is the last part.
    """

    text: str
    tokens: tuple[Token, ...]
    offsets: tuple[int, ...]
    reason: str | None = None


class AnswerWriter:
    """An answer, part by part."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]):
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = Stops(stops)
        self._length = 0

    def push(self, token: Token) -> TextPart:
        """Returns the part that a token adds."""
        is_end = token.ended is Ended.END
        before = self._length
        text = "" if is_end else self._detokenizer.push(token.token)
        text += self._detokenizer.rest() if token.ended else ""
        self._length += len(text)
        shown, stopped = self._stops.push(text)
        reason = Ended.END.value if stopped else token.ended.value if token.ended else None
        if token.ended and not stopped:
            shown += self._stops.rest()
        return TextPart(shown, () if is_end else (token,), () if is_end else (before,), reason)
