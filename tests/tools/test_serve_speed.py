"""The comparison of the engine with another library reads every token and its time."""

import itertools

import jax
import pytest

from moe_jax.decoding import Sampling, generate
from moe_jax.models import Decoder, DecoderConfig
from moe_jax.serving import Engine
from tools.serve_speed import (
    Answered,
    Measure,
    check_equal,
    engine_answers,
    measured,
    table,
)

_SMALL = DecoderConfig(num_layers=1, width=16, num_heads=2, head_dim=8, mlp_dim=32)


def scripted(seconds, tokens=(1, 2)):
    """A library whose steps end after ``seconds``."""
    return lambda prompts, number: Answered([list(tokens)], seconds, seconds[-1])


def test_the_engine_answers_with_the_tokens_of_generate_and_one_time_per_step():
    model = Decoder(_SMALL, 64, jax.random.key(0))
    answer = engine_answers(Engine(model, slots=2, length=16, prefill=4, page=4))
    prompts = [[3, 4, 5], [6, 7, 8]]
    found = answer(prompts, 6)
    assert found.tokens == generate(model, prompts, Sampling(6, temperature=0.0))
    # The second prompt is read in the second step, beside the second token of the first request.
    assert len(found.times) == 5
    assert found.times == sorted(found.times) and found.times[-1] <= found.total


def test_a_step_is_the_median_time_between_tokens():
    # Steps of 2, 2 and 9 seconds, after a first token at 5 seconds.
    assert Answered([], [5.0, 7.0, 9.0, 18.0], 18.0).step == 2.0


def test_the_fastest_peer_is_compared_round_by_round():
    step = Measure("step", 1, 2, 3, lambda answered: answered.step, 1.5)
    peers = {"slow": scripted([0.0, 9.0]), "good": scripted([0.0, 3.0])}
    row = measured(step, scripted([0.0, 2.0]), peers, rounds=3, seed=0)
    assert (row["transformers"], row["ratio"], row["engine_seconds"]) == ("good", 1.5, 2.0)


def test_a_round_counts_the_median_of_its_answers():
    first = Measure("first", 1, 2, 1, lambda answered: answered.times[0], 1.0, repeats=3)
    seconds = itertools.cycle([1.0, 9.0, 2.0])

    def answer(prompts, tokens):
        return Answered([], [next(seconds)], 9.0)

    row = measured(first, answer, {"peer": scripted([3.0])}, rounds=2, seed=0)
    assert (row["engine_seconds"], row["lowest"], row["highest"]) == (2.0, 1.5, 1.5)


def test_other_tokens_are_an_error():
    with pytest.raises(RuntimeError, match="different greedy tokens"):
        check_equal(scripted([1.0]), scripted([1.0], tokens=(1, 3)))


def test_the_table_says_whether_the_machine_was_quiet():
    row = {"name": "step", "engine_seconds": 0.002, "transformers_seconds": 0.003}
    row |= {"transformers": "eager, dynamic", "ratio": 1.5, "lowest": 1.4, "highest": 1.6}
    text = table({"rows": [row | {"target": 1.3}], "rounds": 9, "quiet": False})
    cells = "| step | 2.0 | 3.0 | eager, dynamic | 1.50 | 1.40 to 1.60 | 1.3 |"
    assert text.splitlines()[2:] == [
        cells,
        "",
        "Medians of 9 rounds. Other programs shared the machine.",
    ]
