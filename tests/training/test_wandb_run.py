"""The writer of Weights & Biases, offline: no account and no network."""

import json
import struct

import pytest

from moe_jax.errors import ConfigError
from moe_jax.training import wandb_run
from moe_jax.training.metrics import MetricsWriter
from moe_jax.training.wandb_run import check_wandb

BLOCK, HEADER = 32768, 7


def records(folder):
    """The history and the identity in a folder of offline runs, in the order of its files.

    A file is a log of LevelDB: blocks of 32 KB, which hold parts of records. A part has a checksum
    of 4 bytes, a length of 2, and a kind: whole (1), first (2), middle (3) or last (4).
    """
    wandb_internal_pb2 = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    history, identities = [], []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda p: p.parent.name):
        content, position, record = path.read_bytes(), HEADER, b""
        while position < len(content):
            left = BLOCK - position % BLOCK
            if left < HEADER:
                position += left
                continue
            length, kind = struct.unpack_from("<HB", content, position + 4)
            record += content[position + HEADER : position + HEADER + length]
            position += HEADER + length
            if kind in (1, 4):
                found = wandb_internal_pb2.Record.FromString(record)
                record = b""
                if found.HasField("history"):
                    items = found.history.item
                    keys = ["/".join(item.nested_key) or item.key for item in items]
                    values = [json.loads(item.value_json) for item in items]
                    history.append(dict(zip(keys, values, strict=True)))
                if found.HasField("run"):
                    run = found.run
                    config = {item.key: item.value_json for item in run.config.update}
                    identities.append((run.run_id, run.project, run.display_name, config))
    return history, identities


def write(folder, steps, resume_step=None):
    with MetricsWriter(folder, resume_step, writers=("wandb",)) as writer:
        for step in steps:
            writer.write({"kind": "train", "step": step, "loss": 0.5 / step, "parts": [1, 2]})


def test_a_run_that_goes_on_is_one_run_with_the_numbers_of_the_log(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="pip install 'moe_jax[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "trial")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text('{"config": {"name": "x", "training": {"steps": 3}}}')
    check_wandb()
    write(folder, (1, 2))
    write(folder, (2, 3), resume_step=1)
    history, identities = records(folder)
    shown = [(line["step"], line["train/loss"], line["train/parts/1"]) for line in history]
    assert shown == [(1, 0.5, 2), (2, 0.25, 2), (2, 0.25, 2), (3, 0.5 / 3, 2)]
    first, second = identities[0], identities[-1]
    assert first[:3] == second[:3] and first[1:3] == ("trial", "run")
    assert json.loads(first[3]["training"]) == {"steps": 3}
    assert not (folder / "tensorboard").exists()


def test_starts_in_the_same_second_have_a_folder_each(tmp_path, monkeypatch):
    # Two starts name their folder 20260101_120000; the second waits until the clock says _120001.
    clock = iter(["20260101_120000", "20260101_120000", "20260101_120001"])
    monkeypatch.setattr(wandb_run.time, "strftime", lambda _: next(clock))
    monkeypatch.setattr(wandb_run.time, "sleep", lambda _: None)
    (tmp_path / "offline-run-20260101_120000-ab").mkdir()
    wandb_run._wait_for_a_free_folder(tmp_path, "ab")
    assert next(clock, None) is None


def test_a_missing_package_or_account_is_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'moe_jax\[wandb\]'"):
        check_wandb()
    monkeypatch.undo()
    pytest.importorskip("wandb", reason="pip install 'moe_jax[wandb]'")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr("moe_jax.training.wandb_run._has_account", lambda: False)
    with pytest.raises(ConfigError, match="run wandb login, or set WANDB_MODE=offline"):
        check_wandb()
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_wandb()
