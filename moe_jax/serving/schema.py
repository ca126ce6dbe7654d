"""Bodies of requests: JSON in OpenAI's form, with one line for each mistake."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from moe_jax.errors import nearest
from moe_jax.serving.refusal import wrong

Body = Mapping[str, Any]
# A text, token ids, or messages with role and content.
Prompt = str | tuple[int, ...] | tuple[Mapping[str, str], ...]

_ROLES = ("system", "developer", "user", "assistant")
_MOST_STOPS, _MOST_TOP = 4, 20
_LARGEST_SEED = 2**32 - 1
_LARGEST = 2**31 - 1
_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "logprobs", "n")
_OWN = ("model", "stream", "stream_options", *_SAMPLING)
# Fields that change no token.
_IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
# Fields that the endpoint lacks, with the values that ask for nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), (0,)),
    **dict.fromkeys(("logit_bias", "functions", "tools", "suffix"), ({}, [], "")),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "best_of": (1,),
    "echo": (False,),
}


@dataclasses.dataclass(frozen=True)
class Asked:
    """The content of a body.

    Attributes:
        prompt: Text, token ids or messages.
        model: Name of the model; "" for any.
        most: Largest number of sampled tokens; ``None`` for the default.
        temperature: Temperature of the distribution; 0 takes the most likely token.
        top_p: Probability of the set of most likely tokens among which one is sampled.
        top_k: Number of most likely tokens among which one is sampled; 0 for all.
        seed: Seed of the samples; ``None`` for a random one.
        stop: Texts before which the answer ends.
        stream: True sends the answer in parts.
        usage: True sends the numbers of tokens at the end of a stream.
        logprobs: Number of likely tokens whose log-probabilities are returned at each token; 0 for
            the sampled token alone, ``None`` for no log-probabilities.
    """

    prompt: Prompt
    model: str = ""
    most: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    usage: bool = False
    logprobs: int | None = None


def parsed(content: bytes) -> Body:
    """Returns the JSON object of a body.

    Raises:
        Refusal: If the body is no UTF-8, no JSON, or no object.
    """
    try:
        found = json.loads(content.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise wrong(None, f"the body is not UTF-8: byte {error.start} is wrong") from error
    except RecursionError as error:
        raise wrong(None, "the body is nested too deeply: send a flat JSON object") from error
    except ValueError as error:
        raise wrong(None, f"the body is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise wrong(None, "the body is no JSON object: send {...}")
    return {name: value for name, value in found.items() if value is not None}


def completion_of(body: Body) -> Asked:
    """Returns the content of a body of ``/v1/completions``.

    Raises:
        Refusal: If a field is missing, wrong or unknown.
    """
    _check_names(body, (*_OWN, "prompt"))
    top = _whole(body, "logprobs", 0, _MOST_TOP)
    return Asked(_prompt(body), logprobs=top, most=_whole(body, "max_tokens"), **_shared(body))


def chat_of(body: Body) -> Asked:
    """Returns the content of a body of ``/v1/chat/completions``.

    Raises:
        Refusal: If a field is missing, wrong or unknown.
    """
    _check_names(body, (*_OWN, "messages", "max_completion_tokens", "top_logprobs"))
    top = _whole(body, "top_logprobs", 0, _MOST_TOP)
    wanted = _flag(body, "logprobs")
    if top and not wanted:
        raise wrong("top_logprobs", "top_logprobs needs logprobs=true")
    most = _whole(body, "max_completion_tokens")
    most = _whole(body, "max_tokens") if most is None else most
    logprobs = (top or 0) if wanted else None
    return Asked(_messages(body), logprobs=logprobs, most=most, **_shared(body))


def _shared(body: Body) -> dict[str, Any]:
    """Returns the fields that completions and chats share."""
    if _whole(body, "n") not in (None, 1):
        raise wrong("n", "n must be 1: send one request for each answer")
    options = body.get("stream_options", {})
    if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation"}:
        raise wrong("stream_options", 'stream_options must be {"include_usage": true or false}')
    temperature, top_p = _number(body, "temperature", 0, 2), _number(body, "top_p", 0, 1)
    if top_p == 0:
        raise wrong("top_p", "top_p is 0: give a probability above 0, or temperature=0")
    return {
        "model": _text(body, "model"),
        "temperature": 1.0 if temperature is None else temperature,
        "top_p": 1.0 if top_p is None else top_p,
        "top_k": _whole(body, "top_k", 0) or 0,
        "seed": _whole(body, "seed", 0, _LARGEST_SEED),
        "stop": _stop(body),
        "stream": _flag(body, "stream"),
        "usage": _flag(options, "include_usage"),
    }


def _check_names(body: Body, known: tuple[str, ...]) -> None:
    for name, value in body.items():
        if name in known or name in _IGNORED:
            continue
        if name not in _NEUTRAL:
            raise wrong(name, f"{name!r} is no field of this endpoint{nearest(name, known)}")
        if value not in _NEUTRAL[name]:
            raise wrong(name, f"this endpoint has no {name}: leave the field out")


def _prompt(body: Body) -> Prompt:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return _utf8("prompt", prompt)
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return tuple(prompt)
    raise wrong("prompt", "prompt must be one text, or one list of at least one token id")


def _messages(body: Body) -> Prompt:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise wrong("messages", 'messages must be a list of {"role": ..., "content": ...}')
    return tuple(_message(message, f"messages[{i}]") for i, message in enumerate(messages))


def _message(message: Any, path: str) -> Mapping[str, str]:
    if not isinstance(message, dict) or message.keys() - {"role", "content", "name", "refusal"}:
        raise wrong(path, f"{path} must be an object with role and content")
    if message.get("role") not in _ROLES:
        raise wrong(f"{path}.role", f"{path}.role must be one of {', '.join(_ROLES)}")
    content = message.get("content")
    if isinstance(content, list) and all(map(_is_text_part, content)):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise wrong(f"{path}.content", f"{path}.content must be text, or a list of parts of text")
    return {"role": message["role"], "content": _utf8(f"{path}.content", content)}


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and type(part.get("text")) is str


def _stop(body: Body) -> tuple[str, ...]:
    stop = body.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    texts = isinstance(stop, list) and all(isinstance(text, str) and text for text in stop)
    if not texts or len(stop) > _MOST_STOPS:
        raise wrong("stop", f"stop must be a text or up to {_MOST_STOPS} texts, none empty")
    return tuple(_utf8("stop", text) for text in stop)


def _flag(body: Body, name: str) -> bool:
    return _of(body, name, lambda value: isinstance(value, bool), "true or false") or False


def _text(body: Body, name: str) -> str:
    return _of(body, name, lambda value: isinstance(value, str), "a text") or ""


def _number(body: Body, name: str, low: float, high: float) -> float | None:
    def fits(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value) and low <= value <= high

    return _of(body, name, fits, f"a number from {low} to {high}")


def _whole(body: Body, name: str, low: int = 1, high: int = _LARGEST) -> int | None:
    def fits(value: Any) -> bool:
        return type(value) is int and low <= value <= high

    return _of(body, name, fits, f"a whole number from {low} to {high}")


def _of(body: Body, name: str, fits: Callable[[Any], bool], kind: str) -> Any:
    """Returns a field of a body, or ``None`` if the body lacks it."""
    value = body.get(name)
    if value is not None and not fits(value):
        raise wrong(name, f"{name} must be {kind}")
    return value


def _utf8(name: str, text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise wrong(name, f"{name} has half of a surrogate pair: send whole characters") from error
    return text


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")
