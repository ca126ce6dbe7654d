"""Continual learning with new experts beside frozen ones: real files and real runs."""

import numpy as np
import pytest

import moe_jax as mj
from moe_jax.config.loading import experiment_of
from moe_jax.errors import ConfigError
from moe_jax.run.continual import Method, continual
from moe_jax.surgery.new_experts import with_new_experts
from moe_jax.training.state import named_leaves
from tests.data.corpora import write_rows
from tests.system import tiny


def test_new_experts_learn_and_the_old_ones_stay(tmp_path):
    texts = {"a": "ab" * 40, "b": "xyz" * 30}
    for name, text in texts.items():
        write_rows(tmp_path / f"{name}.jsonl", [{"text": text} for _ in range(30)])
    changes = {
        "data.source": "blend",
        "data.blend.parts": tuple(
            {"source": f"files:{tmp_path}/{name}.jsonl", "name": name} for name in texts
        ),
        "data.data_dir": str(tmp_path / "data"),
        "model.dropout": 0.0,
        "model.moe.every": 1,
        "optimizer.learning_rate": 0.01,
        "training.steps": 20,
        "training.eval_every": 0,
    }
    others = {"optimizer.frozen": ("attention", "embedding", "norms")}
    methods = {"tuned": Method(), "grown": with_new_experts((0, 1), settings=others)}
    found = continual(tiny.get_config(), tmp_path / "runs", methods, changes)
    assert found["grown"].forgetting < found["tuned"].forgetting
    assert found["grown"].gain > 0.2
    before, after = (
        named_leaves(mj.open_run(tmp_path / "runs" / n).state) for n in ("first", "grown")
    )
    changed = set()
    for name in (name for name in after if name.startswith("params/")):
        old, new = np.asarray(before[name]), np.asarray(after[name])
        if "/experts/" in name:
            axis = old.shape.index(4)
            old_rows, copies = np.split(new, [4], axis)
            np.testing.assert_array_equal(old_rows, old)
            assert (copies != np.take(old, (0, 1), axis)).any()
        elif old.shape != new.shape or (old != new).any():
            changed.add(name)
    assert changed and all("/router/" in name for name in changed)


def test_the_configuration_of_a_larger_model_needs_no_run():
    first = experiment_of(tiny.get_config(), {"training.start_from": "elsewhere"})
    larger = with_new_experts((0, 2)).begin.experiment(first, {"training.steps": 7})
    assert (larger.model.moe.num_experts, larger.optimizer.frozen_experts) == (6, 4)
    assert (larger.training.steps, larger.training.start_from) == (7, "")
    dense = experiment_of(tiny.get_config("dense"))
    with pytest.raises(ConfigError, match="the layers have .. experts"):
        with_new_experts((0,)).begin.experiment(dense, {})
