from hypothesis import given
from hypothesis import strategies as st

from moe_jax import data
from moe_jax.training.history import Logged, digest, spans, split


@given(st.lists(st.integers(0, 60), unique=True).map(sorted))
def test_ranges_hold_the_steps_that_were_added(steps):
    logged = Logged()
    for step in steps:
        logged.add("train", step)
    again = Logged(logged.ranges)
    assert again.missing([]) == [("train", step) for step in steps]
    assert again.missing({("train", step) for step in steps}) == []


def test_a_rhythm_is_one_range():
    logged = Logged()
    # The last step is logged even where it is out of rhythm.
    for step in (10, 20, 30, 40, 45):
        logged.add("train", step)
    logged.add("eval", 40)
    assert logged.ranges == {"train": [[10, 40, 10], [45, 45, 0]], "eval": [[40, 40, 0]]}


def test_a_step_that_is_logged_again_counts_once():
    logged = Logged({"train": [[1, 3, 1]]})
    for step in (2, 3, 4):
        logged.add("train", step)
    assert logged.ranges == {"train": [[1, 4, 1]]}


def test_steps_in_words():
    assert spans([7]) == "step 7"
    assert spans([3, 4, 5]) == "steps 3 to 5"
    assert spans([10, 20, 30]) == "steps 10 to 30"
    assert spans([1, 5, 6]) == "3 steps of 1 to 6"


def test_a_checkpoint_of_older_code_has_no_notes():
    assert split({"next": 3}) == ({"next": 3}, {})
    notes = {"log": {"train": [[1, 2, 1]]}, "tokenizer": "ab"}
    assert split({"next": 3, **notes}) == ({"next": 3}, notes)


def test_a_tokenizer_is_named_by_its_content():
    plain = data.Bytes()
    assert digest(plain) == digest(data.Bytes())
    assert digest(plain) != digest(data.WithSentinels(plain, 4))
    assert digest(data.WithSentinels(plain, 4)) != digest(data.WithSentinels(plain, 5))
