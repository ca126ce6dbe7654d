"""Merged adapters: arrays by hand, and runs of our own and of released models."""

import dataclasses

import numpy as np
import pytest

import moe_jax as mj
from moe_jax.errors import ConfigError
from moe_jax.nn.adapted import LoRA
from moe_jax.surgery.adapters import merge_adapters
from tests.parity.compare_models import recorded
from tests.surgery.small import MODEL, weights
from tests.surgery.test_api import SMALL, files_of

LORA = LoRA(2, 6.0, ("experts", "router"))
TEXT = {name: value for name, value in SMALL.items() if not name.startswith("model.")}
ADAPTED = {
    "model.lora.rank": 2,
    "model.lora.groups": ("experts", "attention", "router"),
    "optimizer.learning_rate": 0.1,
}


def test_merged_arrays_are_the_sums_and_the_others_stay():
    adapted = weights(dataclasses.replace(MODEL, lora=LORA))
    plain = adapted.merged()
    assert plain.model == MODEL and plain.merged() is plain
    assert plain.shapes.keys() == plain.arrays.keys()
    for name, array in plain.arrays.items():
        if f"{name}/base" not in adapted.arrays:
            np.testing.assert_array_equal(array, adapted.arrays[name])
            continue
        base, a, b = (adapted.arrays[f"{name}/{part}"] for part in ("base", "lora_a", "lora_b"))
        expected = np.asarray(base) + 3 * np.asarray(a) @ np.asarray(b)  # alpha / rank = 3
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-6)
    assert len(adapted.arrays) - len(plain.arrays) == 2 * 2 * 4  # two layers, four matrices


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral")
    recorded("mixtral", folder)
    return folder


@pytest.fixture(scope="module")
def adapted(released):
    """A run that adapts a released model."""
    folder = released.with_name("adapted")
    start = {"training.start_from": str(released), "training.steps": 2}
    mj.train("quickstart", folder, overrides=TEXT | ADAPTED | start)
    return folder


def test_a_released_model_is_adapted_merged_and_exported(adapted, tmp_path):
    before = files_of(adapted)
    changed = merge_adapters(adapted, tmp_path / "merged")
    assert files_of(adapted) == before and (changed.kind, changed.difference) == ("run", "")
    one, other = mj.open_run(adapted), mj.open_run(tmp_path / "merged")
    assert (other.step, other.config.model.lora) == (0, None)
    assert other.evaluate()["loss"] == one.evaluate()["loss"]
    assert other.generate("abc", tokens=3, seed=1) == one.generate("abc", tokens=3, seed=1)
    for run in (one, other):
        mj.save_hf(run, tmp_path / f"hf{run.step}")
    files = [tmp_path / f"hf{step}" / "model.safetensors" for step in (one.step, other.step)]
    assert files[0].read_bytes() == files[1].read_bytes()
    trained = mj.train(other.config, tmp_path / "merged")
    assert trained.step == other.config.training.steps


def test_adapted_runs_are_pruned_with_merged_weights(adapted, tmp_path):
    mj.prune(adapted, tmp_path / "pruned", experts=2, batches=1)
    assert mj.open_run(tmp_path / "pruned").config.model.lora is None


@pytest.mark.parametrize("message", ["has adapters: write a run without them", "has no adapters"])
def test_one_line_and_no_folder(message, adapted, released, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=message) as error:
        if "without" in message:
            start = {"training.start_from": str(adapted)}
            mj.train("quickstart", out, overrides=TEXT | ADAPTED | start)
        else:
            merge_adapters(released, out)
    assert "\n" not in str(error.value) and not out.exists()
