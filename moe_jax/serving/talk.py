"""Answers of a model in the same process, part by part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from moe_jax.data import Tokenizer, chat_prompt
from moe_jax.decoding import Sampling
from moe_jax.serving.asking import encoded
from moe_jax.serving.request import Generator, Request
from moe_jax.serving.written import AnswerWriter


def parts(engine: Generator, tokenizer: Tokenizer, request: Request) -> Iterator[str]:
    """Yields the text of an answer in whole characters; the engine has no other request."""
    writer = AnswerWriter(tokenizer, ())
    number, reason = engine.submit(request), None
    try:
        while reason is None:
            for token in engine.step():
                part = writer.push(token)
                reason = part.reason
                yield part.text
    finally:
        engine.cancel(number)


def talk(
    engine: Generator, tokenizer: Tokenizer, lines: Iterable[str], sampling: Sampling, window: int
) -> Iterator[str]:
    """Yields the answers to messages of a user, part by part, with a newline after each answer.

    Args:
        engine: Engine of the model, without other requests.
        tokenizer: Tokenizer of the model, with its chat template.
        lines: Messages; each one continues the dialogue.
        sampling: Settings of each answer.
        window: Number of tokens of the dialogue that the model reads, the last ones.

    Raises:
        ConfigError: If the chat template rejects the dialogue.
    """
    messages = list[dict[str, str]]()
    for line in lines:
        messages.append({"role": "user", "content": line.rstrip("\n")})
        prompt = encoded(tokenizer, chat_prompt(tokenizer, messages))[-window:]
        said = ""
        for part in parts(engine, tokenizer, Request(prompt, sampling)):
            said += part
            yield part
        yield "\n"
        messages.append({"role": "assistant", "content": said})
