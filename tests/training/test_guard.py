from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from moe_jax import data
from moe_jax.errors import TrainingError
from moe_jax.run.loop import Diverged, Loop, _Guard
from moe_jax.training.history import Logged
from moe_jax.training.state import TrainState


def report(in_row):
    loss = jnp.float32(jnp.nan if in_row else 2.0)
    return SimpleNamespace(
        losses=SimpleNamespace(loss=loss),
        grad_norm=jnp.float32(1.0),
        skipped_in_row=jnp.int32(in_row),
        skipped=in_row,
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


def unapplied(in_row):
    """A report of a finite loss and gradient whose update was skipped."""
    number = jnp.float32(2.0)
    losses = SimpleNamespace(loss=number)
    return SimpleNamespace(losses=losses, grad_norm=number, skipped_in_row=jnp.int32(in_row))


def test_an_update_that_is_not_finite_is_told_from_a_loss_that_is_not(caplog):
    guard = _Guard(2)
    with caplog.at_level("WARNING", logger="absl"):
        guard.look(1, unapplied(1))
        guard.look(2, unapplied(2))
        with pytest.raises(Diverged, match=r"step 2: check optimizer.learning_rate, optimizer.cl"):
            guard.close()
    assert [record.getMessage() for record in caplog.records] == [
        f"step {step}: loss 2.0 and gradient norm 2.0 are finite, but the state after the update "
        f"is not; update skipped ({step} in a row)"
        for step in (1, 2)
    ]


class Disk:
    """Checkpoints that remember which steps they were given."""

    directory = Path("runs/a/checkpoints")

    def __init__(self, found=None, damaged=None):
        self.found, self.newest, self.saved = found, damaged or found, []

    def restore(self, like, *, step=None):
        return None if self.found is None else (self.found, like, {})

    def latest_step(self):
        return self.newest

    def save(self, step, state, data_state):
        self.saved.append(step)

    def wait(self):
        pass


def state(value=1.0):
    params, zero = {"w": jnp.array([1.0, value])}, jnp.int32(0)
    key = jax.random.key_data(jax.random.key(0))
    return TrainState(zero, params, {}, {"count": zero}, key, zero, zero)


def loop(disk):
    session = SimpleNamespace(
        abstract=state(),
        first_state=lambda: state(),
        experiment=SimpleNamespace(data=None),
        tokenizer=data.Bytes(),
    )
    return Loop(session, disk, None)


BATCHES = SimpleNamespace(get_state=lambda: {})


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_state_that_is_not_finite_is_never_saved(value):
    disk = Disk()
    training = loop(disk)
    training._save(3, state(), BATCHES, Logged())
    with pytest.raises(TrainingError, match=r"state at step 4 .* in params/w: it is not saved"):
        training._save(4, state(value), BATCHES, Logged())
    assert disk.saved == [3]


def test_a_run_does_not_start_from_a_state_that_is_not_finite():
    with pytest.raises(TrainingError, match="step 0 .* in params/w: start from weights that are f"):
        loop(Disk()).run(0, state(jnp.nan), None)
    training = loop(Disk(found=7))
    training.restore()
    with pytest.raises(TrainingError, match="remove runs/a/checkpoints/7 to go on"):
        training.run(7, state(jnp.nan), None)


@pytest.mark.parametrize(
    ("disk", "saves", "last"),
    [
        (Disk(), (), "no checkpoint was written yet"),
        (Disk(found=5), (), "checkpoint 5 is good"),
        # The restored one is 5 because 9 is damaged, which is still there.
        (Disk(found=5, damaged=9), (), "checkpoint 5 is good"),
        (Disk(found=5, damaged=9), (12,), "checkpoint 12 is good"),
    ],
)
def test_a_run_that_diverged_names_a_checkpoint_that_it_restored_or_wrote(disk, saves, last):
    training, guard = loop(disk), _Guard(1)
    training.restore()
    for step in saves:
        training._save(step, state(), BATCHES, Logged())
    training._look(guard, 13, unapplied(1))
    with pytest.raises(Diverged, match=f"; {last}$"):
        training._look(guard, 14, None)


def test_a_skip_is_warned_of(caplog):
    guard = _Guard(3)
    with caplog.at_level("WARNING", logger="absl"):
        look(guard, 0, 0, 1, 0)
        guard.close()
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning == (
        "step 3: loss nan or gradient norm 1.0 is not finite; update skipped (1 in a row)"
    )
