"""Requests of the generator, made of the content of bodies."""

from __future__ import annotations

import dataclasses
import secrets

from moe_jax.data import Tokenizer, chat_prompt, end_ids
from moe_jax.decoding import Sampling
from moe_jax.errors import ConfigError, line_of
from moe_jax.serving.refusal import Refusal, wrong
from moe_jax.serving.request import Request
from moe_jax.serving.schema import Asked, Prompt


@dataclasses.dataclass(frozen=True)
class Served:
    """A model as the endpoint offers it.

    Attributes:
        name: Name of the model for clients.
        tokenizer: Tokenizer of the model, with its chat template.
        vocab_size: Number of token ids ``V`` of the model.
        context: Largest number of tokens of prompt and answer together.
    """

    name: str
    tokenizer: Tokenizer
    vocab_size: int
    context: int


def request_of(served: Served, asked: Asked, default: int | None) -> Request:
    """Returns the request of the generator; long texts take a while to encode.

    Args:
        served: The model.
        asked: Content of the body.
        default: Largest number of sampled tokens if the body names none; ``None`` for the rest of
            the context.

    Raises:
        Refusal: If the body names another model, or prompt and answer do not fit into the context.
    """
    check_model(served, asked.model)
    prompt = _ids(served, asked.prompt)
    room = served.context - len(prompt)
    most = asked.most if asked.most is not None else min(default or room, room)
    if most > room or room < 1:
        raise Refusal(
            400,
            f"the prompt has {len(prompt)} tokens and max_tokens is {max(most, 1)}, and the model "
            f"reads {served.context} together: shorten one of them",
            code="context_length_exceeded",
        )
    seed = secrets.randbits(32) if asked.seed is None else asked.seed
    ends = end_ids(served.tokenizer)
    sampling = Sampling(most, asked.temperature, asked.top_k, asked.top_p, seed, ends)
    return Request(prompt, sampling, asked.logprobs or 0)


def check_model(served: Served, name: str) -> None:
    """Rejects the name of another model; "" is any model."""
    if name not in ("", served.name):
        line = f"the model {name!r} is not here: use {served.name!r}"
        raise Refusal(404, line, param="model", code="model_not_found")


def _ids(served: Served, prompt: Prompt) -> tuple[int, ...]:
    """Returns the token ids of a prompt; a text begins with the begin token."""
    if isinstance(prompt, str):
        return encoded(served.tokenizer, prompt)
    ids = tuple(token for token in prompt if isinstance(token, int))
    if not ids:
        return encoded(served.tokenizer, _dialogue(served.tokenizer, prompt))
    unknown = next((token for token in ids if not 0 <= token < served.vocab_size), None)
    if unknown is not None:
        line = f"the token {unknown} of the prompt is not from 0 to {served.vocab_size - 1}"
        raise wrong("prompt", line)
    return ids


def encoded(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Returns the token ids of a text, after the begin token."""
    return (tokenizer.bos_id, *tokenizer.encode(text).tolist())


def _dialogue(tokenizer: Tokenizer, prompt: Prompt) -> str:
    messages = [message for message in prompt if not isinstance(message, str | int)]
    try:
        return chat_prompt(tokenizer, messages)
    except ConfigError as error:
        raise wrong("messages", str(error)) from error
    except Exception as error:
        # The template comes with the folder of the model, and may raise any error.
        raise wrong("messages", f"the chat template fails: {line_of(error)}") from error
