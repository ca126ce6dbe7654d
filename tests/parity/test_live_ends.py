"""Texts end where ``transformers.generate`` ends them (``make parity``)."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: run `make parity`")
pytest.importorskip("transformers", reason="transformers is not installed: run `make parity`")
pytest.importorskip("tokenizers", reason="tokenizers is not installed")

from moe_jax import data, decoding  # noqa: E402
from moe_jax.interop.folders import tokenizer_of  # noqa: E402
from moe_jax.interop.huggingface import load  # noqa: E402
from tests.data.test_hf_tokenizer import byte_level  # noqa: E402
from tests.parity import models  # noqa: E402

PROMPTS, ADDED = ([5, 9, 4], [7, 12, 31]), 10


def rows_of(folder, ends):
    """Greedy rows of ``transformers`` under the settings of a folder, without padding."""
    model = models.load(folder)
    rows = [
        model.generate(torch.tensor([prompt]), max_new_tokens=ADDED, do_sample=False)[0, 3:]
        for prompt in PROMPTS
    ]
    assert model.generation_config.eos_token_id == ends
    return [row.tolist() for row in rows]


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_rows_end_at_the_end_tokens_of_the_folder(tmp_path, file):
    models.make("mixtral", tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    first, second = rows_of(tmp_path, None)
    # The first row ends at its fifth token at the latest, and the second row at its third.
    ends = [first[4], second[2]]
    settings = tmp_path / file
    content = json.loads(settings.read_text()) if settings.exists() else {}
    settings.write_text(json.dumps(content | {"eos_token_id": ends}))
    wanted = rows_of(tmp_path, ends)
    assert [len(row) for row in wanted] != [ADDED, ADDED]

    byte_level(tmp_path, eos_token="<s>")  # Its id, 1, is in no row.
    tokenizer = data.open_tokenizer(data.DataConfig(tokenizer=tokenizer_of(tmp_path)))
    own, *released = data.end_ids(tokenizer)
    assert released == ends and own not in np.ravel([*first, *second])
    sampling = decoding.Sampling(ADDED, 0.0, eos_id=data.end_ids(tokenizer))
    assert decoding.generate(load(tmp_path).model, PROMPTS, sampling) == wanted
