"""By commands alone: a released model is read, trained on and written for others again."""

import json

import pytest
from safetensors.numpy import load_file

from tests.data.test_hf_tokenizer import byte_level
from tests.parity.compare_models import recorded
from tests.system.runs import command

pytest.importorskip("tokenizers", reason="tokenizers is not installed")


def test_a_released_model_is_tuned_and_exported_with_its_tokenizer(tmp_path):
    source, run, out = (tmp_path / name for name in ("source", "run", "out"))
    source.mkdir()
    recorded("mixtral", source)
    byte_level(source)
    (source / "LICENSE").write_text("free")
    trained = command(
        "moe_jax.train",
        f"--config=configs/from_hf.py:{source}",
        f"--workdir={run}",
        "--config.data.source=mixture",
        "--config.data.mixture.num_documents=64",
        "--config.data.mixture.num_eval_documents=4",
        "--config.data.seq_length=16",
        "--config.model.moe.group_size=128",
        "--config.training.steps=2",
    )
    assert trained.returncode == 0, trained.stderr
    assert f"mixtral of {source}, with its own tokenizer" in trained.stdout
    # 280 ids, and 43 rows in the released embedding.
    assert "43 rows of the start, 237 drawn ones after them" in trained.stdout
    written = command(
        "moe_jax.convert", "--from=moe_jax", f"--input={run}", f"--output={out}", "--dtype=bfloat16"
    )
    assert written.returncode == 0, written.stderr
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 280
    before, after = (load_file(path / "model.safetensors") for path in (source, out))
    assert before.keys() == after.keys()
    assert {str(tensor.dtype) for tensor in after.values()} == {"bfloat16"}
