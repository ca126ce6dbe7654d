"""Answers part by part, in the process of the model."""

from moe_jax import data
from moe_jax.decoding import Sampling
from moe_jax.serving.request import Request
from moe_jax.serving.talk import parts, talk
from tests.serving.generators import Scripted

BYTES = data.Bytes()


def test_an_answer_comes_in_whole_characters_and_leaves_no_request():
    generator = Scripted(BYTES.encode("été"))
    found = parts(generator, BYTES, Request((1,), Sampling(5)))
    assert [text for text in found if text] == ["é", "t", "é"] and not generator.requests
    leaving = parts(generator, BYTES, Request((1,), Sampling(5)))
    next(leaving)
    leaving.close()
    assert not generator.requests


def test_a_chat_goes_on_with_its_answers():
    generator = Scripted(BYTES.encode("yes"))
    said = talk(generator, BYTES, ["a?\n", "b?"], Sampling(3), window=1000)
    assert "".join(said) == "yes\nyes\n"
    prompts = [BYTES.decode(request.prompt[1:]) for request in generator.seen]
    first = "<|user|>\na?\n<|assistant|>\n"
    assert prompts == [first, f"{first}yes\n<|user|>\nb?\n<|assistant|>\n"]
    list(talk(generator, BYTES, ["a?"], Sampling(3), window=4))
    # The model reads the last four tokens of "<|assistant|>" and its newline.
    assert BYTES.decode(generator.seen[-1].prompt) == "t|>\n"
