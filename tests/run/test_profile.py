"""A trace of some steps names the parts of a step, and a bad window is one line."""

import gzip
import json
import re
import types

import pytest

import moe_jax as mj
from moe_jax.errors import ConfigError
from moe_jax.run import train
from moe_jax.run.profile import SCOPES, Profiler, Window, window_of
from moe_jax.training.metrics import read_metrics

SMALL = {
    "data.source": "mixture",
    "data.tokenizer": "bytes",
    "data.seq_length": 32,
    "data.batch_size": 8,
    "data.eval_documents": 4,
    "data.mixture.document_length": 64,
    "data.mixture.num_documents": 64,
    "mesh.data": 1,
    "mesh.expert": 8,
    "model.num_layers": 1,
    "model.width": 16,
    "model.num_heads": 2,
    "model.head_dim": 8,
    "model.mlp_dim": 32,
    "model.moe.every": 1,
    "model.moe.num_experts": 8,
    "model.moe.expert_dim": 32,
    "model.moe.group_size": 32,
    "optimizer.warmup_steps": 1,
    "training.loss_chunk": 0,
    "training.log_every": 1,
    "training.steps": 4,
}


def test_a_trace_holds_the_scopes_of_its_steps(tmp_path):
    mj.train("quickstart", tmp_path, SMALL, profile="2:4")
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    (perfetto,) = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
    # The gradient of the scope ``head`` is named ``jvp(head)`` and ``transpose(jvp(head))``.
    named = {name.decode() for name in re.findall(rb"[/(](\w+)[/)]", trace.read_bytes())}
    assert [scope for scope in SCOPES if scope not in named] == []
    events = json.loads(gzip.decompress(perfetto.read_bytes()))["traceEvents"]
    steps = [event["args"]["step_num"] for event in events if event.get("name") == "train"]
    assert sorted(map(int, steps)) == [2, 3]
    lines = [line for line in read_metrics(tmp_path) if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("5", "is not FIRST:END, such as --profile=5:8"),
        ("", "is not FIRST:END"),
        ("-1:2", "is not FIRST:END"),
        ("0:2", "starts before step 1"),
        ("5:5", "holds no step: END must be larger than FIRST"),
        ("8:5", "holds no step"),
        ("5:12", "ends after training.steps=10: END can be 11 at most"),
    ],
)
def test_a_bad_window_is_one_line(text, fault):
    with pytest.raises(ConfigError, match=fault) as error:
        window_of(text, 10)
    assert "\n" not in str(error.value)


def test_a_window_has_its_first_step_and_lacks_its_end():
    window = window_of("5:8", 10)
    assert [step for step in range(1, 11) if step in window] == [5, 6, 7]
    assert window_of("10:11", 10).first == 10


def test_a_bad_window_starts_nothing(tmp_path):
    with pytest.raises(ConfigError, match="--profile=9:12 ends after training.steps=4"):
        mj.train("quickstart", tmp_path / "run", SMALL, profile="9:12")
    assert not (tmp_path / "run").exists()


def test_a_finished_run_says_that_it_traces_nothing(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(train, "has_result", lambda folder: True)
    warned = []
    voice = types.SimpleNamespace(say=lambda line: None, warn=warned.append)
    assert train._train(None, tmp_path, None, voice, Window(2, 3)) is None
    assert warned == [f"--profile=2:3 traces no step, because {tmp_path} is finished"]


def test_without_a_window_no_step_is_traced(tmp_path):
    with Profiler(tmp_path / "profile").open() as profiler, profiler.step(1) as results:
        results.append(None)
    assert not (tmp_path / "profile").exists()
