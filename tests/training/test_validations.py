"""The lowest validation loss of a run, and the end that it brings."""

import math

import pytest

from moe_jax.training.validations import Validations


def after(*losses):
    """The summary after validations at steps 10, 20, ..."""
    found = Validations()
    for number, loss in enumerate(losses, start=1):
        found = found.after(10 * number, loss)
    return found


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ((), Validations()),
        ((3.0,), Validations(10, 10, 3.0, 0)),
        ((3.0, 2.0), Validations(20, 20, 2.0, 0)),
        ((3.0, 3.5, 3.2), Validations(30, 10, 3.0, 2)),
        # An equal loss is not lower: the earlier step stays the best.
        ((3.0, 3.0), Validations(20, 10, 3.0, 1)),
        # A loss that is not finite is never the lowest; the log has null for it.
        ((math.nan, None, math.inf), Validations(30, 0, None, 3)),
        ((math.nan, 3.0), Validations(20, 20, 3.0, 0)),
        ((3.0, math.nan, 2.0, 4.0), Validations(40, 30, 2.0, 1)),
    ],
    ids=str,
)
def test_the_summary_of_losses(losses, expected):
    assert after(*losses) == expected


def test_a_run_ends_after_as_many_validations_without_a_lower_loss_as_its_patience():
    ended = [after(*[1.0, 2.0, 3.0, 0.5][:n]).exhausted(2) for n in range(5)]
    assert ended == [False, False, False, True, False]
    assert not after(1.0, *[2.0] * 50).exhausted(0)


def test_only_later_validations_of_a_log_count():
    log = [
        {"kind": "eval", "step": 10, "loss": 1.0},
        {"kind": "train", "step": 30, "loss": 0.1},
        {"kind": "eval", "step": 30, "loss": 2.0},
    ]
    assert Validations(20, 20, 3.0).after_all(log) == Validations(30, 30, 2.0)
    assert Validations(30, 20, 3.0).after_all(log) == Validations(30, 20, 3.0)


def test_words():
    found = str(after(3.0, 3.5))
    assert found == "lowest validation loss 3.0000 nats at step 10, validations since then: 1"
    assert str(after(math.nan)) == "validations without a finite loss: 1"
