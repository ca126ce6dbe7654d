"""Drafts of lookahead modules: what they read, what they predict, and that they change no token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.decoding import Sampling
from moe_jax.errors import ConfigError
from moe_jax.models import Decoder
from moe_jax.nn.mode import DECODE
from moe_jax.serving import Engine, LookaheadModule, NGram, Request, Speculation
from moe_jax.serving.ahead import Following
from moe_jax.serving.pages import Held
from moe_jax.serving.program import StepShape
from moe_jax.serving.running import Running, TokensRead
from tests.serving.test_engine import CONFIGS, drained
from tests.serving.test_speculation import same_with_drafts
from tests.test_decoding import SMALL, VOCAB

AHEAD = Speculation(LookaheadModule())
TWO_LAYERS = dataclasses.replace(SMALL, num_layers=2)
FEW = {"slots": 1, "length": 24, "prefill": 6, "page": 4, "logprobs": 0}


def model_of(config=TWO_LAYERS, modules=1):
    return Decoder(dataclasses.replace(config, lookahead=modules), VOCAB, jax.random.key(1))


def part_of(tokens, prompt, computed, number, row, drafts=()):
    """A part that reads ``number`` tokens after ``computed``."""
    request = Request(tuple(tokens[:prompt]), Sampling(tokens=9))
    held = Held([1, 2, 3], computed, 0, 0)
    return TokensRead(row, Running(row, request, held, list(tokens)), number, row, tuple(drafts))


def test_the_tokens_after_those_of_a_step():
    # Three slots with one draft each, then a chunk of three tokens: N = 3 * 2 + 3.
    shape = StepShape(slots=3, chunk=3, pages=3, page=4, drafts=1)
    parts = [
        part_of([5, 6, 7], prompt=2, computed=2, number=1, row=0, drafts=[8]),
        # The chunk has read 11 12 13 of a prompt that goes on with 14.
        part_of([11, 12, 13, 14], prompt=4, computed=0, number=3, row=1),
    ]
    found = Following.of(parts, shape, modules=2)
    assert shape.tokens == 9
    assert found.known.tolist() == [
        [-1, -1, -1, -1, -1, -1, 12, 13, 14],
        [-1, -1, -1, -1, -1, -1, 13, 14, -1],
    ]
    assert found.last.tolist() == [0, 9, 9]  # Only the first request samples.
    assert found.samples[:2].tolist() == [0, 1]
    # The last token of a prompt in a chunk: its sample is the first of row 1, of two per row.
    ends = Following.of([part_of([11, 12, 13], 3, 0, 3, row=1)], shape, modules=1)
    assert ends.known[0, 6:].tolist() == [12, 13, -1]
    assert ends.last.tolist() == [9, 8, 9] and ends.samples[8] == 2


def test_drafts_are_the_predictions_of_the_modules_on_the_whole_text():
    model = model_of(modules=2)
    engine = Engine(model, **FEW, speculation=AHEAD)
    prompt = tuple(np.random.default_rng(0).integers(0, VOCAB, 9).tolist())
    engine.submit(Request(prompt, Sampling(6, 0.0)))
    tokens, found, wanted = list(prompt), [], []
    while engine.running or engine.waiting:
        new = [token.token for token in engine.step()]
        tokens += new
        if new:
            found.append(np.asarray(engine._drafter._drafts)[0].tolist())
            wanted.append(predictions(model, tokens, modules=2))
    # After the prompt both modules have read its tokens alone; later the second one has entries
    # that have read wrong drafts.
    assert found[0] == wanted[0]
    assert [drafts[0] for drafts in found] == [drafts[0] for drafts in wanted]
    assert len(found) >= 3 and len({drafts[0] for drafts in found}) > 1


def predictions(model, tokens, modules):
    """Most likely tokens after ``tokens``, one per module, each from a pass over the whole text."""
    text = list(tokens)
    for d in range(modules):
        # Module d predicts the token that is 2 + d places after the position it reads.
        inputs, targets = np.zeros((2, 1, 32), np.int32)
        inputs[0, : len(tokens) - 1], targets[0, : len(text) - 1] = tokens[:-1], text[1:]
        segments = np.zeros((1, 32), np.int32)
        segments[0, : len(text)] = 1
        positions = np.arange(32, dtype=np.int32)[None]
        batch = {"inputs": inputs, "targets": targets}
        batch |= {"segments": segments, "positions": positions}
        state = _read(model, batch)[d][0, len(tokens) - 2]
        text.append(int(jnp.argmax(model.logits(state[None, None])[0, 0])))
    return text[len(tokens) :]


@jax.jit
def _read(model, batch):
    return model.read({name: jnp.asarray(x) for name, x in batch.items()}, mode=DECODE).ahead


def test_drafts_of_lookahead_modules_change_no_token():
    counts = same_with_drafts(model_of(modules=2), Speculation(LookaheadModule(), tokens=4), 6)
    assert counts.proposed > 20


@pytest.mark.parametrize("name", CONFIGS)
def test_drafts_change_no_token_in_every_model_with_a_module(name):
    assert same_with_drafts(model_of(CONFIGS[name]), AHEAD, 5).proposed > 10


def test_a_model_without_modules_is_refused():
    model = Decoder(SMALL, VOCAB, jax.random.key(1))
    with pytest.raises(ConfigError, match="no lookahead module .*draft with ngram or with"):
        Engine(model, **FEW, speculation=AHEAD)


def test_a_module_drafts_one_token_and_other_drafters_what_is_asked():
    model = model_of(modules=2)
    assert AHEAD.most(model) == 2 and Speculation(LookaheadModule(), 1).most(model) == 1
    assert Speculation(NGram(), 7).most(model) == 7


def test_a_trained_module_is_often_right():
    """The text counts up, so a trained module knows the second token ahead."""
    model = model_of()
    # One row starts at each token, so that no token belongs to one position.
    text = (jnp.arange(VOCAB)[:, None] + jnp.arange(17)) % VOCAB
    batch = {"inputs": text[:, :-1], "targets": text[:, 1:]}
    positions = jnp.broadcast_to(jnp.arange(16), (VOCAB, 16))
    batch |= {"segments": jnp.ones((VOCAB, 16), int), "positions": positions}
    rule = optax.adam(3e-3)

    def loss(model):
        read = model.read(batch, mode=DECODE)
        later = jnp.roll(batch["targets"], -1, axis=1)
        pairs = ((read.hidden, batch["targets"]), (read.ahead[0], later))
        logits = ((model.logits(x), y) for x, y in pairs)
        nats = optax.softmax_cross_entropy_with_integer_labels
        return sum(nats(x[:, :-1], y[:, :-1]).mean() for x, y in logits)

    @jax.jit
    def update(model, state):
        grads = jax.grad(loss, allow_int=True)(model)
        changes, state = rule.update(grads, state)
        return optax.apply_updates(model, changes), state

    state = rule.init(model)
    for _ in range(150):
        model, state = update(model, state)
    engine = Engine(model, **FEW, speculation=AHEAD)
    number = engine.submit(Request((3, 4, 5, 6), Sampling(11, 0.0)))
    assert [token.token for token in drained(engine)[number]] == list(range(7, 18))
    assert engine.drafts.acceptance > 0.8
