"""A run of our own as a folder of ``transformers``: its tokenizer, its logits and lm_eval."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: run `make parity`")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: run `make parity`"
)

import moe_jax as mj  # noqa: E402
from moe_jax import data  # noqa: E402
from moe_jax.config.experiment import Experiment, TrainingConfig  # noqa: E402
from moe_jax.interop.huggingface import load  # noqa: E402
from moe_jax.run import workdir  # noqa: E402
from moe_jax.run.session import open_checkpoints, open_session  # noqa: E402
from moe_jax.training.state import named_leaves  # noqa: E402
from tests.parity.compare_models import recorded  # noqa: E402

TEXTS = ("def f(x):\n    return x\n", "two  spaces, é and \u2581\n\nthe end")


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def exported(request, tmp_path_factory):
    """An untrained run with a tokenizer of its own, and its export."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "released").mkdir()
    recorded("mixtral", folder / "released")
    given = data.DataConfig("mixture", tokenizer=request.param)
    own = {"bytes": data.Bytes, "sentencepiece": lambda: data.train_sentencepiece(TEXTS, 290)}
    tokenizer = own[request.param]()
    model = load(folder / "released").config
    experiment = Experiment("own", model, given, training=TrainingConfig(steps=2))
    session = open_session(experiment, tokenizer)
    workdir.claim(folder / "run", experiment)
    tokenizer.save(folder / "run")
    with open_checkpoints(experiment, folder / "run" / workdir.CHECKPOINTS) as checkpoints:
        checkpoints.save(1, named_leaves(session.recipe.create()[1]), {})
    mj.save_hf(mj.open_run(folder / "run"), folder / "out", family="mixtral")
    return tokenizer, folder / "out"


def nats(model, ids):
    """Negative log-likelihood of ``ids`` after the first."""
    logits = np.asarray(model.logits([ids[:-1]]))[0]
    likely = np.asarray(jax.nn.log_softmax(logits))
    return -likely[np.arange(len(ids) - 1), ids[1:]].sum()


def test_transformers_reads_the_tokenizer_and_has_the_logits(exported):
    tokenizer, folder = exported
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ids == [tokenizer.bos_id, *tokenizer.encode(text).tolist()]
        assert theirs.decode(ids, skip_special_tokens=True) == text
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits.numpy()
        np.testing.assert_allclose(mj.load_hf(folder).logits([ids]), logits, atol=1e-4)


def test_lm_eval_counts_the_same_bits(exported, tmp_path):
    pytest.importorskip("lm_eval", reason='lm_eval is not installed: pip install "lm_eval[hf]"')
    tokenizer, folder = exported
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "documents.jsonl").write_text(lines)
    shutil.copytree(Path("examples/lm_eval"), tmp_path / "tasks")
    settings = f"pretrained={folder},dtype=float32,add_bos_token=False"
    command = ["-m", "lm_eval", "--model", "hf", "--model_args", settings, "--tasks", "own_text"]
    command += ["--include_path", "tasks", "--device", "cpu", "--output_path", "out.json"]
    subprocess.run([sys.executable, *command], cwd=tmp_path, check=True, timeout=600)
    written = json.loads(next(tmp_path.glob("out*.json")).read_text())
    found = written["results"]["own_text"]["bits_per_byte,none"]
    model = mj.load_hf(folder)
    total = sum(nats(model, [tokenizer.bos_id, *tokenizer.encode(text)]) for text in TEXTS)
    expected = total / sum(len(text.encode()) for text in TEXTS) / math.log(2)
    assert found == pytest.approx(expected, rel=1e-4)
