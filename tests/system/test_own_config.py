"""A config of one's own, which starts from one of the package, in any folder."""

import json
import os
import subprocess
import sys

import pytest

from tests.system.runs import TIMEOUT, environment

OWN = """
from moe_jax.configs import quickstart


def get_config(variant="switch"):
    config = quickstart.get_config(variant)
    config.name = "mine"
    config.data.update(source="mixture", tokenizer="bytes", seq_length=32, batch_size=8)
    config.data.eval_documents = 4
    config.data.mixture.update(num_documents=64, num_eval_documents=4, document_length=64)
    config.model.update(num_layers=2, width=16, num_heads=2, head_dim=8, mlp_dim=32)
    config.model.moe.update(num_experts=4, expert_dim=32, group_size=32)
    config.training.update(steps=2, loss_chunk=0, log_every=1)
    return config
"""


@pytest.fixture
def own(tmp_path):
    """A folder with ``settings/mine.py``, and an empty folder beside it."""
    for name in ("settings", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "settings/mine.py").write_text(OWN)
    return tmp_path


def moe_jax(folder, *arguments):
    """Runs the command in a folder; its output."""
    done = subprocess.run(
        [sys.executable, "-m", "moe_jax", *map(str, arguments)],
        cwd=folder,
        env=environment(1),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_read_from_another_folder(own):
    found = json.loads(moe_jax(own / "empty", "count", "../settings/mine.py:dense"))
    # All parameters of a dense model are active.
    assert found["name"] == "mine" and {*found["active"].values()} == {found["total"]}


def test_it_trains_from_any_folder(own):
    said = moe_jax(own / "empty", "train", own / "settings/mine.py", "--workdir=runs/a")
    assert said.endswith("report: runs/a/report.html\n")
    assert os.listdir(own / "empty") == ["runs"]
    again = moe_jax(own, "train", "settings/mine.py", "--workdir=empty/runs/a")
    assert "is finished" in again
    assert json.loads(moe_jax(own, "evaluate", "empty/runs/a"))["step"] == 2
    page = (own / "empty/runs/a/report.html").read_text()
    assert f"<code>moe-jax train --config={own}/settings/mine.py --workdir=runs/a</code>" in page
