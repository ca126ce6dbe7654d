"""Changed runs that keep their optimizer: real runs with two checkpoints."""

import numpy as np
import pytest

import moe_jax as mj
from moe_jax.errors import CheckpointError, ConfigError
from moe_jax.training.state import named_leaves
from tests.parity.compare_models import recorded
from tests.surgery.test_api import SMALL
from tests.surgery.test_continued import ADAM, layer

KEEP = {"optimizer": "keep", "overrides": {"training.steps": 3}}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four experts in each layer, with checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("runs") / "moe"
    changes = {
        "training.steps": 2,
        "training.checkpoint_every": 1,
        "training.log_every": 1,
        "model.moe.num_experts": 4,
        "model.scan_layers": False,
    }
    mj.train("quickstart", folder, overrides={**SMALL, **changes})
    return folder


def up_of(folder, step=None, tree=ADAM + "mu/"):
    """An array ``(E, M, F)`` of the experts of layer 1, of their moments by default."""
    run = mj.open_run(folder, step=step)
    return layer(named_leaves(run.state), run.config.model, tree, "1/feed_forward/experts/up")


def kept(many, few):
    """Indices of the arrays of ``many`` that are in ``few``."""
    return [index for index, one in enumerate(many) if any((one == other).all() for other in few)]


CHANGES = {
    "prune": lambda run, out: mj.prune(run, out, experts=3, batches=1, **KEEP),
    "merge": lambda run, out: mj.merge(run, out, experts=3, batches=1, **KEEP),
    "grow": lambda run, out: mj.grow(run, out, copies=2, **KEEP),
    "take": lambda run, out: mj.take_experts(
        run, out, other=run, other_step=1, experts=[2], **KEEP
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_run_that_keeps_its_optimizer_goes_on_at_its_step(run, tmp_path, change):
    changed = CHANGES[change](run, tmp_path / "out")
    assert changed.step == 2 and "its optimizer goes on at step 2" in str(changed)
    before, after = up_of(run), up_of(tmp_path / "out")
    assert len(kept(before, before)) == 4 and before.any(axis=(1, 2)).all()
    if change == "prune":
        chosen = kept(*(up_of(folder, tree="params/") for folder in (run, tmp_path / "out")))
        np.testing.assert_array_equal(after, before[chosen])
    elif change == "merge":  # two of four experts are merged
        assert len(kept(before, after)) == 2 and len(after) == 3
    elif change == "grow":
        np.testing.assert_array_equal(after, before.repeat(2, 0))
    else:
        assert kept(before, after) == [0, 1, 3] and kept(up_of(run, 1), after) == [2]
    old, new = (named_leaves(mj.open_run(folder).state) for folder in (run, tmp_path / "out"))
    assert {int(new[n]) for n in new if n.endswith("/count")} == {2}
    np.testing.assert_array_equal(new["key"], old["key"])
    trained = mj.train(mj.open_run(tmp_path / "out").config, tmp_path / "out")
    assert [line["step"] for line in trained.metrics if line["kind"] == "train"] == [3]


def test_what_has_no_state_of_an_optimizer_is_one_line(run, tmp_path):
    (tmp_path / "hf").mkdir()
    recorded("mixtral", tmp_path / "hf")
    mj.grow(run, tmp_path / "begun", copies=2)
    out = tmp_path / "out"
    for source, options, match in (
        (tmp_path / "hf", {}, "is no run and has no state of an optimizer: leave out --optimizer"),
        (tmp_path / "begun", {}, "is at step 0, before the first moments: leave out --optimizer"),
        (run, {"overrides": {"data.batch_size": 4}}, "leave the settings data.NAME out"),
        (run, {"family": "mixtral"}, "leave --family out"),
        (run, {"step": 7}, "7"),
        (run, {"optimizer": "half"}, "optimizer='half' is none of new and keep"),
    ):
        with pytest.raises((ConfigError, CheckpointError), match=match) as error:
            mj.grow(source, out, **{"copies": 2, "optimizer": "keep", **options})
        assert "\n" not in str(error.value) and not out.exists()
    with pytest.raises(ConfigError, match="leave the settings data.NAME out"):
        settings = {"data.batch_size": 4}
        mj.prune(run, out, experts=2, file="missing.txt", optimizer="keep", overrides=settings)
    with pytest.raises(ConfigError, match="hf is no run and has no state of an optimizer"):
        mj.take_experts(tmp_path / "hf", out, other=run, experts=[0], optimizer="keep")
    with pytest.raises(ConfigError, match="begun is at step 0"):
        begun = tmp_path / "begun"
        mj.take_experts(begun, out, other=begun, experts=[0], optimizer="keep")
