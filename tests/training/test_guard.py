from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from moe_jax.training.loop import Diverged, _Guard


def report(in_row):
    loss = jnp.float32(jnp.nan if in_row else 2.0)
    return SimpleNamespace(
        loss=loss, grad_norm=jnp.float32(1.0), skipped_in_row=jnp.int32(in_row), skipped=in_row
    )


def look(guard, *in_row, start=1):
    for step, number in enumerate(in_row, start):
        guard.look(step, report(number))


def test_a_run_without_skips_goes_on():
    guard = _Guard(1)
    guard.close()
    look(guard, 0, 0, 0)
    guard.close()


def test_so_many_in_a_row_stop_the_run_one_step_later():
    guard = _Guard(3)
    look(guard, 0, 0, 1, 2, 3)
    # Steps 3, 4 and 5 were skipped: the parameters are those after step 2.
    with pytest.raises(Diverged) as caught:
        guard.look(6, report(4))
    message = str(caught.value)
    assert caught.value.step == 2
    assert message.startswith("3 non-finite updates in a row at step 5: ")
    assert "optimizer.learning_rate" in message
    assert message.endswith("step 2")
    assert "\n" not in message


def test_the_last_step_counts_when_the_run_is_over():
    guard = _Guard(2)
    look(guard, 0, 1, 2)
    with pytest.raises(Diverged, match="2 non-finite updates in a row at step 3"):
        guard.close()


def test_a_good_step_in_between_starts_again():
    guard = _Guard(3)
    look(guard, 1, 2, 0, 1, 2, 0, 1, 2, 0)
    guard.close()


def test_a_limit_of_one_stops_at_the_first():
    guard = _Guard(1)
    look(guard, 0, 1, start=8)
    with pytest.raises(Diverged, match="1 non-finite updates in a row at step 9.*step 8"):
        guard.close()


def test_a_skip_is_warned_of(caplog):
    guard = _Guard(3)
    with caplog.at_level("WARNING", logger="absl"):
        look(guard, 0, 0, 1, 0)
        guard.close()
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning == (
        "step 3: loss nan or gradient norm 1.0 is not finite; update skipped (1 in a row)"
    )
