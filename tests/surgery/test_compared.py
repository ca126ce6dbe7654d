"""Experts of folders: hashes, differences, and experts of an older step."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax as mj
from moe_jax.cli import diff_experts as diff_command
from moe_jax.cli import hash_experts as hash_command
from moe_jax.cli import take_experts as take_command
from moe_jax.errors import ConfigError
from moe_jax.surgery.destination import write
from moe_jax.surgery.mixture import mixtures
from moe_jax.surgery.source import open_source
from moe_jax.surgery.versions import network_of, on_host
from tests.parity.compare_models import recorded
from tests.surgery.test_api import SMALL, files_of, flags_of


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four experts in one layer, with checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("runs") / "moe"
    changes = {"training.steps": 2, "training.checkpoint_every": 1, "model.moe.num_experts": 4}
    mj.train("quickstart", folder, overrides={**SMALL, **changes})
    return folder


def test_an_expert_of_an_older_step_comes_back(run, tmp_path, capsys):
    before = files_of(run)
    out = tmp_path / "out"
    arguments = (f"--input={run}", f"--other={run}", "--other_step=1", f"--output={out}")
    take_command.main(flags_of(take_command, *arguments, "--experts=2", "--router"))
    assert "the function differs: experts are taken from" in capsys.readouterr().out
    assert files_of(run) == before
    old, new, taken = (
        {one.expert: one for one in mj.hash_experts(folder, step=step)}
        for folder, step in ((run, 1), (run, 2), (out, None))
    )
    assert all(old[expert] != new[expert] for expert in range(4))
    assert taken == {**new, 2: old[2]}
    changes = mj.diff_experts(run, out, step=2)
    assert [change.equal for change in changes] == [True, True, False, True]
    again = mj.open_run(out)
    assert again.step == 0 and np.isfinite(again.evaluate()["loss"])


def test_commands_print_one_line_for_each_expert(run, capsys):
    hash_command.main(flags_of(hash_command, f"--model={run}", "--step=1"))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = mj.hash_experts(run, step=1)
    assert [(one["expert"], one["network"]) for one in lines] == [
        (one.expert, one.network) for one in expected
    ]
    arguments = (f"--model={run}", f"--other={run}", "--step=1")
    diff_command.main(flags_of(diff_command, *arguments, "--other_step=2"))
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == "0 of 4 experts are equal" and len(lines) == 4
    first = json.loads(lines[0])
    assert 0 < first["network"] < 1 and not first["equal"] and first["layer"] == expected[0].layer


@pytest.fixture
def released(tmp_path):
    """Two models of transformers, of which the second has another expert 1 in layer 0."""
    (tmp_path / "hf").mkdir()
    recorded("mixtral", tmp_path / "hf")
    opened = open_source(tmp_path / "hf")
    name = "params/layers/0/feed_forward/experts/up"
    up = np.array(opened.weights.arrays[name])
    tuned = up * np.where(np.arange(5) == 1, 1.5, 1.0)[:, None, None].astype("f")
    arrays = {**opened.weights.arrays, name: jnp.asarray(tuned)}
    write(opened, dataclasses.replace(opened.weights, arrays=arrays), tmp_path / "tuned")
    return tmp_path / "hf", tmp_path / "tuned", up[1]


def test_a_model_of_transformers_takes_an_expert_and_stays_one(released, tmp_path):
    one, other, up = released
    changes = {(c.layer, c.expert): c for c in mj.diff_experts(one, other)}
    assert [place for place, change in changes.items() if not change.equal] == [(0, 1)]
    # Half of ``up`` is the change of three matrices.
    network = network_of(on_host(mixtures(open_source(one).weights)[0]), 1)
    norm = np.sqrt(sum(np.sum(np.square(x)) for x in network.values()))
    assert changes[0, 1].network == pytest.approx(0.5 * np.linalg.norm(up) / norm, rel=1e-5)
    assert changes[0, 1].router == 0
    before = files_of(one), files_of(other)
    taken = mj.take_experts(other, tmp_path / "out", other=one, experts=[1], layers=[0])
    assert taken.kind == "hf" and (files_of(one), files_of(other)) == before
    assert mj.hash_experts(tmp_path / "out") == mj.hash_experts(one) != mj.hash_experts(other)
    for change, match in REFUSED:
        with pytest.raises(ConfigError, match=match) as error:
            mj.take_experts(one, tmp_path / "no", **{"other": other, **change})
        assert not (tmp_path / "no").exists() and "\n" not in str(error.value)


REFUSED = [
    ({"experts": [5]}, "layer 0 has no expert 5: it has 0 to 4"),
    ({"experts": []}, "no expert is given"),
    ({"experts": [0], "layers": [7]}, "layer 7 has no experts; the MoE layers are 0, 1"),
    ({"experts": [0], "other_step": 9}, "--step selects a checkpoint of a run"),
    ({"experts": [0], "other": "nowhere"}, "--other=nowhere holds no run"),
]
