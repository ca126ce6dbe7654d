"""Bodies of requests: their content, and the line for each mistake."""

import json

import pytest

from moe_jax.serving.refusal import Refusal
from moe_jax.serving.schema import Asked, chat_of, completion_of, parsed

HELLO = [{"role": "user", "content": "hello"}]


def test_a_completion_has_openai_s_defaults():
    assert completion_of({"prompt": "a"}) == Asked("a")
    whole = {"prompt": [[5, 7]], "model": "m", "max_tokens": 3, "temperature": 0, "top_p": 0.5}
    whole |= {"top_k": 2, "seed": 1, "stop": "x", "stream": True, "logprobs": 2, "n": 1}
    whole |= {"stream_options": {"include_usage": True}, "user": "me", "presence_penalty": 0}
    assert completion_of(whole) == Asked((5, 7), "m", 3, 0, 0.5, 2, 1, ("x",), True, True, 2)


def test_a_chat_has_messages_of_text():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {"messages": [*HELLO, {"role": "assistant", "content": parts}], "logprobs": True}
    found = chat_of({**body, "max_completion_tokens": 7, "max_tokens": 9})
    assert found.prompt == (*HELLO, {"role": "assistant", "content": "ab"})
    assert (found.most, found.logprobs) == (7, 0)
    assert chat_of({**body, "top_logprobs": 3}).logprobs == 3
    assert chat_of({"messages": HELLO}).logprobs is None


def test_null_is_a_field_that_is_missing():
    assert completion_of(parsed(b'{"prompt": "a", "stop": null, "max_tokens": null}')) == Asked("a")


CONTENTS = {
    b"": "the body is not JSON",
    b"{": "the body is not JSON",
    b"[1]": "the body is no JSON object",
    b'{"prompt": "\xff"}': "the body is not UTF-8: byte 12 is wrong",
    "{}".encode("utf-16"): "the body is not UTF-8",
    b'{"temperature": NaN}': "NaN is no number of JSON",
    b'{"seed": 1' + b"0" * 5000 + b"}": "the body is not JSON",
    b"[" * 100_000: "the body is nested too deeply",
}


@pytest.mark.parametrize("content", CONTENTS, ids=lambda content: repr(content[:12]))
def test_a_body_is_a_json_object_in_utf8(content):
    with pytest.raises(Refusal, match=CONTENTS[content]) as found:
        parsed(content)
    assert found.value.status == 400 and "\n" not in found.value.message


WRONG = {
    "missing": ({}, "prompt must be one text"),
    "several": ({"prompt": ["a", "b"]}, "prompt must be one text"),
    "no token": ({"prompt": []}, "at least one token id"),
    "no ids": ({"prompt": [1, True]}, "prompt must be"),
    "half a pair": (json.loads('{"prompt": "\\ud800"}'), "half of a surrogate pair"),
    "zero tokens": ({"prompt": "a", "max_tokens": 0}, "max_tokens must be a whole number from 1"),
    "true": ({"prompt": "a", "max_tokens": True}, "max_tokens must be a whole number"),
    "fraction": ({"prompt": "a", "max_tokens": 1.5}, "max_tokens must be a whole number"),
    "hot": ({"prompt": "a", "temperature": 2.1}, "temperature must be a number from 0 to 2"),
    "infinite": ({"prompt": "a", "temperature": float("inf")}, "temperature must be a number"),
    "no set": ({"prompt": "a", "top_p": 0}, "top_p is 0"),
    "two": ({"prompt": "a", "n": 2}, "n must be 1: send one request for each answer"),
    "best of": ({"prompt": "a", "best_of": 2}, "has no best_of: leave the field out"),
    "penalty": ({"prompt": "a", "presence_penalty": 0.5}, "has no presence_penalty"),
    "unknown": ({"prompt": "a", "temprature": 1}, "did you mean 'temperature'"),
    "empty stop": ({"prompt": "a", "stop": ""}, "stop must be a text or up to 4 texts"),
    "stops": ({"prompt": "a", "stop": ["a"] * 5}, "stop must be a text or up to 4 texts"),
    "stream": ({"prompt": "a", "stream": "yes"}, "stream must be true or false"),
    "options": ({"prompt": "a", "stream_options": {"usage": True}}, "stream_options must be"),
    "seed": ({"prompt": "a", "seed": -1}, "seed must be a whole number from 0"),
}
WRONG_CHATS = {
    "none": ({"messages": []}, "messages must be a list"),
    "no object": ({"messages": ["a"]}, r"messages\[0\] must be an object"),
    "role": ({"messages": [{"role": "king", "content": ""}]}, r"messages\[0\].role must be one of"),
    "picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        r"messages\[0\].content must be text",
    ),
    "top": ({"messages": HELLO, "top_logprobs": 1}, "top_logprobs needs logprobs=true"),
    "tools": ({"messages": HELLO, "tools": [{}]}, "has no tools"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_in_a_completion_is_one_line(case):
    body, line = WRONG[case]
    with pytest.raises(Refusal, match=line) as found:
        completion_of(body)
    assert found.value.status == 400 and found.value.param


@pytest.mark.parametrize("case", WRONG_CHATS)
def test_a_mistake_in_a_chat_is_one_line(case):
    body, line = WRONG_CHATS[case]
    with pytest.raises(Refusal, match=line) as found:
        chat_of(body)
    assert found.value.status == 400 and found.value.param
