"""Training from Python raises and never exits; the examples in ``train`` train."""

import pytest

from moe_jax.config.loading import experiment_of
from moe_jax.errors import ConfigError
from moe_jax.run import workdir
from moe_jax.run.api import open_run, train

TINY = {"data.source": "mixture", "data.tokenizer": "bytes", "mesh.expert": 8, "mesh.data": 1}


def test_what_cannot_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'quickstart'"):
        train("quickstrt", tmp_path / "run")
    with pytest.raises(ConfigError, match="num_experts=4 is not divisible by mesh.expert=8"):
        train("quickstart", tmp_path / "run", {**TINY, "model.moe.num_experts": 4})
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_run_is_refused(tmp_path):
    workdir.claim(tmp_path, experiment_of("quickstart", {**TINY, "model.width": 64}))
    with pytest.raises(ConfigError, match="model.width: 64 there, 128 here"):
        train("quickstart", tmp_path, {**TINY, "optimizer.warmup_steps": 1})


def test_only_a_run_with_a_checkpoint_opens(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        open_run(tmp_path)
    workdir.claim(tmp_path, experiment_of("quickstart", TINY))
    with pytest.raises(ConfigError, match="holds no checkpoint yet"):
        open_run(tmp_path)
