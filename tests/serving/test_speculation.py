"""Drafts by hand, and the distribution of the tokens that they lead to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from moe_jax.decoding import Sampling
from moe_jax.errors import ConfigError
from moe_jax.models import Decoder
from moe_jax.serving import DraftModel, Engine, NGram, Request, Speculation
from moe_jax.serving.program import key_of
from moe_jax.serving.speculation import Drafts, agreeing
from tests.serving.test_engine import CONFIGS, SIZES, answers, drawn, mixed
from tests.test_decoding import SMALL, VOCAB


@pytest.mark.parametrize(
    ("tokens", "number", "drafts"),
    [
        ([1, 2, 3, 9, 1, 2, 3], 2, (9, 1)),  # 1 2 3 was followed by 9 1
        ([1, 2, 3, 9, 1, 2, 3], 9, (9, 1, 2, 3)),  # what is known of the continuation
        ([7, 3, 5, 8, 3, 6, 3], 1, (6,)),  # the last 3 before, not the first
        ([7, 4, 3, 5, 8, 3, 6, 4, 3], 1, (5,)),  # 4 3 before the nearer 3 alone
        ([1, 2, 3], 4, ()),  # 3 is new
        ([5], 4, ()),
        ([5, 5], 3, (5,)),
    ],
)
def test_the_longest_last_tokens_that_came_before_are_continued(tokens, number, drafts):
    assert NGram(longest=3).after(tokens, number) == drafts


def test_a_lookup_of_no_token_is_refused():
    with pytest.raises(ConfigError, match="longest=0"):
        NGram(longest=0)


def test_drafts_count_up_to_the_first_wrong_one():
    assert agreeing((4, 5, 6), (4, 5, 6, 7)) == 3
    assert agreeing((4, 5, 6), (4, 8, 6, 7)) == 1
    assert agreeing((4, 5, 6), (3, 5, 6, 7)) == 0
    assert agreeing((), (3,)) == 0
    assert Drafts(8, 6).acceptance == 0.75 and Drafts().acceptance == 0


def test_tokens_per_step_count_requests_with_and_without_drafts():
    found = Drafts()
    assert found.tokens_per_step == 0
    found.count(proposed=3, accepted=2, tokens=3)
    found.count(proposed=0, accepted=0, tokens=1)
    assert found == Drafts(3, 2, 4, 2) and found.tokens_per_step == 2.0


def test_accepted_tokens_have_the_distribution_of_the_model():
    """A chi-squared test over many seeds: the pair of a checked draft and of the token after it.

    The model is a table of a first distribution and of one for each first token. The drafter always
    proposes token 1. With its own keys, the model draws a first token; if it is the draft, the same
    step has drawn the second token, and else a second step draws it.
    """
    first = jnp.log(jnp.array([0.2, 0.5, 0.3]))
    second = jnp.log(jnp.array([[0.1, 0.1, 0.8], [0.6, 0.3, 0.1], [0.3, 0.4, 0.3]]))

    def sample(seed):
        one = jax.random.categorical(key_of(seed, 0), first)
        checked = jax.random.categorical(key_of(seed, 1), second[1])
        other = jax.random.categorical(key_of(seed, 1), second[one])
        return one, jnp.where(one == 1, checked, other)

    ones, twos = map(np.asarray, jax.jit(jax.vmap(sample))(jnp.arange(20000)))
    counts = np.zeros((3, 3))
    np.add.at(counts, (ones, twos), 1)
    wanted = np.exp(np.asarray(first, float))[:, None] * np.exp(np.asarray(second, float))
    assert stats.chisquare(counts.ravel(), 20000 * (wanted / wanted.sum()).ravel()).pvalue > 1e-3
    # The draft is accepted with its probability under the model.
    assert (ones == 1).mean() == pytest.approx(0.5, abs=0.015)


def model_of(name, seed=1):
    return Decoder(CONFIGS[name], VOCAB, jax.random.key(seed))


def repeating(seed):
    """A request whose prompt repeats itself, so that a lookup has drafts."""
    request = drawn(np.random.default_rng(seed), longest=12)
    return Request((*request.prompt, *request.prompt), request.sampling, logprobs=2)


def same_with_drafts(model, speculation, number=8):
    """Checks that drafts change no token, alone and in a mix; returns the counts of drafts."""
    plain, drafting = (Engine(model, **SIZES, speculation=each) for each in (None, speculation))
    requests = [repeating(seed) for seed in range(number)]
    wanted = [answers(plain, [request])[0] for request in requests]
    assert [answers(drafting, [request])[0] for request in requests] == wanted
    assert mixed(drafting, requests, np.random.default_rng(0)) == wanted
    assert drafting.running == drafting.waiting == 0 and drafting.free_pages == plain.free_pages
    return drafting.drafts


def test_looked_up_drafts_change_no_token():
    counts = same_with_drafts(model_of("windows"), Speculation(NGram(2), tokens=3))
    assert 0 < counts.accepted < counts.proposed


def test_a_model_that_drafts_for_itself_is_always_right():
    model = model_of("windows")
    counts = same_with_drafts(model, Speculation(DraftModel(model), tokens=2), 6)
    assert counts.acceptance == 1.0 and counts.proposed > 20


def test_a_smaller_draft_model_changes_no_token():
    draft = Decoder(SMALL, VOCAB, jax.random.key(5))
    counts = same_with_drafts(model_of("windows"), Speculation(DraftModel(draft), tokens=3), 6)
    assert 0 < counts.accepted < counts.proposed


@pytest.mark.parametrize("name", CONFIGS)
def test_drafts_change_no_token_in_every_model(name):
    same_with_drafts(model_of(name), Speculation(NGram(), tokens=2), 6)


def test_accepted_drafts_save_steps():
    model = model_of("windows")
    engine = Engine(model, **SIZES, speculation=Speculation(DraftModel(model), tokens=3))
    engine.submit(Request((1, 2, 3), Sampling(tokens=9, temperature=0.0)))
    sizes = []
    while engine.running or engine.waiting:
        sizes.append(len(engine.step()))
    # The prompt gives one token; then three drafts and the token after them, twice.
    assert sizes == [1, 4, 4]
    assert engine.drafts == Drafts(proposed=6, accepted=6, tokens=9, steps=3)


def test_the_last_token_is_never_drafted_and_an_end_token_ends_within_drafts():
    model = model_of("windows")
    hot = Sampling(tokens=9, temperature=1.5, seed=3)
    engine = Engine(model, **SIZES, speculation=Speculation(DraftModel(model), tokens=4))
    (whole,) = answers(engine, [Request((1, 2, 3), hot)])
    place = next(i for i, token in enumerate(whole) if i > 1 and token not in whole[:i])
    short = dataclasses.replace(hot, eos_id=whole[place])
    assert answers(engine, [Request((1, 2, 3), short)]) == [whole[: place + 1]]
    one = dataclasses.replace(hot, tokens=1)
    assert answers(engine, [Request((1, 2, 3), one)]) == [whole[:1]]


def test_a_draft_model_of_another_vocabulary_is_refused():
    other = DraftModel(Decoder(SMALL, VOCAB + 1, jax.random.key(0)))
    with pytest.raises(ConfigError, match="draft model has .* token ids"):
        Engine(model_of("windows"), **SIZES, speculation=Speculation(other))
