"""The line of ``results.jsonl`` names the text that its run has read."""

import json

import pytest

from moe_jax.ablation.records import record
from moe_jax.ablation.runner import run_of
from tests.ablation.tiny_ablation import ABLATION

_CORPUS = {"training": 64, "validation": 4, "sha256": "ab" * 32}


@pytest.mark.parametrize(
    ("recorded", "expected"), [({"corpus": _CORPUS}, {"corpus": "ab" * 32}), ({}, {})]
)
def test_the_hash_of_the_corpus_is_the_one_in_the_folder_of_the_run(tmp_path, recorded, expected):
    # A run that has diverged leaves no more than this; runs of older versions recorded no text.
    run = run_of(ABLATION, "cpu", 0, "switch", tmp_path)
    run.folder.mkdir(parents=True)
    about = {"git_commit": None, "versions": {"python": "3", "jax": "0"}, **recorded}
    (run.folder / "config.json").write_text(json.dumps(about))
    ended = {"step": 2, "seconds": 1.0, "device": "1 x cpu"}
    (run.folder / "diverged.json").write_text(json.dumps(ended))
    line = {"kind": "train", "step": 1, "loss": 3.0}
    (run.folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    found = record(run)
    assert {name: found[name] for name in found if name == "corpus"} == expected
