"""Alarms of a real run: warned, logged, reported, and a stop that the same command continues."""

import functools
import json

import jax
import numpy as np
import pytest
from absl import flags

import moe_jax as mj
from moe_jax.cli import alarming, main, serve
from moe_jax.monitor import SaturatedGates
from moe_jax.monitor.alarms import load_distance
from moe_jax.run import reference_stream
from moe_jax.run.loop import StoppedByAlarm
from moe_jax.run.opened import open_folder
from moe_jax.run.predecessors import FinishedRun
from moe_jax.training.step import eval_step
from tests.data.corpora import write_rows
from tests.system import tiny

# A capacity factor this small always drops choices, and no entropy is above 1.
CHANGES = {
    "model.moe.router.capacity_factor": 0.25,
    "training.steps": 4,
    "optimizer.warmup_steps": 2,
    "training.log_every": 1,
    "training.eval_every": 2,
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    top = tmp_path_factory.mktemp("alarms")
    write_rows(top / "a.jsonl", [{"text": "ab" * 40} for _ in range(30)])
    data = {"data.source": f"files:{top}/a.jsonl", "data.data_dir": str(top / "data")}
    folder = top / "run"
    alarms = (
        {"type": "Drops", "above": 0.3, "stop": True},
        {"type": "Drift", "above": 0.0},
        {"type": "SaturatedGates", "steps": 1, "above": 0.0},
    )
    changes = {**CHANGES, **data, "training.alarms": alarms}
    with pytest.raises(StoppedByAlarm) as error:
        mj.train(tiny.get_config(), folder, changes)
    return str(error.value), mj.train(tiny.get_config(), folder, changes), data


def test_it_stops_at_once_and_says_how_to_go_on(stopped):
    message, _, _ = stopped
    assert message.startswith("an alarm stopped the run at step 1, which is saved (Drops in layer")
    assert "the same command goes on" in message


def test_the_same_command_goes_on_to_the_end(stopped):
    _, run, _ = stopped
    lines = [line for line in run.metrics if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all("Drops" in line["alarms"] and line["active_alarms"] for line in lines)


def test_lines_have_the_mean_share_of_the_top_score(stopped):
    _, run, _ = stopped
    lines = [line for line in run.metrics if line["kind"] == "train"]
    # The scores of 4 experts sum to 1. The first line has no line before it.
    assert all(0.25 < layer["top_score"] <= 1 for line in lines for layer in line["layers"])
    assert ["SaturatedGates" in line["alarms"] for line in lines] == [False, True, True, True]


def test_the_top_scores_of_one_device_are_those_of_eight(stopped):
    _, run, _ = stopped
    session, state = run.session, jax.device_get((run.state.params, run.state.router_state))
    step = jax.jit(functools.partial(eval_step, session.graph, 0))
    sums = [step(*state, dict(batch)).layers for batch in session.eval_batches()]
    assert session.mesh.size == 8
    for index, layer in enumerate(run.evaluate()["layers"]):
        top = sum(float(layers[index].observed["top_score"]) for layers in sums)
        valid = sum(float(layers[index].valid) for layers in sums)
        assert layer["top_score"] == pytest.approx(top / valid, rel=1e-5)


def test_an_evaluated_stream_meets_the_rules_of_the_run(stopped, tmp_path):
    _, run, _ = stopped
    write_rows(tmp_path / "b.jsonl", [{"text": "xyz" * 40} for _ in range(30)])
    rules = ({"type": "Drift", "above": 0.0}, {"type": "Overload", "above": 1.0})
    other = {"data.source": f"files:{tmp_path}/b.jsonl", "training.alarms": rules}
    found = mj.open_run(run.workdir, overrides=other).evaluate()
    last = [line for line in run.metrics if line["kind"] == "eval"][-1]
    (layer,), (own,) = found["layers"], last["layers"]
    distance = load_distance(layer["demand"], own["demand"])
    assert distance > 0.01 and f"{distance:.3f}" in found["alarms"]["Drift"][str(layer["layer"])]
    assert set(found["alarms"]) == {"Drift", "Overload"}
    # Bytes of "ab" and of "xyz" share the token that begins a document alone.
    drift = found["drift"][""]
    assert drift["tokens"] > 0.9 and drift["drifted"].startswith("data")
    words = found["alarms"]["Drift"]
    # The limit is the distance of the halves of the run's only validation document.
    assert "from the validation documents of the run, above 0.1" in words["all"]
    assert words["all"].endswith(": drift of the data")
    assert "drift of the data" in words[str(layer["layer"])]


def test_another_router_on_the_same_documents_is_a_drift_of_the_routing(stopped, tmp_path):
    _, run, data = stopped
    seed = {"training.seed": 7, "training.alarms": ()}
    mj.train(tiny.get_config(), tmp_path / "other", CHANGES | data | seed)
    rule = {"type": "Drift", "above": 0.01, "reference": str(tmp_path / "other")}
    found = mj.open_run(run.workdir, overrides={"training.alarms": (rule,)}).evaluate()
    drift = found["drift"][rule["reference"]]
    assert drift["tokens"] == 0 and drift["drifted"] == "routing"
    (words,) = found["alarms"]["Drift"].values()
    assert "drift of the routing" in words and "of the data" not in words


def test_a_reference_with_another_tokenizer_leaves_the_kind_unknown(stopped, tmp_path, monkeypatch):
    _, run, data = stopped
    monkeypatch.setattr(reference_stream, "_same_ids", lambda *both: False)
    other = {"data.source": "python_library", "training.alarms": ({"type": "Drift", "above": 0.0},)}
    found = mj.open_run(run.workdir, overrides=other).evaluate()
    (words,) = found["alarms"]["Drift"].values()
    assert found["drift"] == {} and words.endswith("of unknown kind")


def test_a_reference_whose_text_is_not_here_leaves_the_kind_unknown(stopped, monkeypatch):
    _, run, _ = stopped
    opened = open_folder(run.workdir, None, lambda model: None)
    assert reference_stream.reference_stream("", run.workdir, opened) is not None

    def missing(*_):
        raise FileNotFoundError("no text")

    monkeypatch.setattr(reference_stream.data, "texts", missing)
    assert reference_stream.reference_stream("", run.workdir, opened) is None


def test_the_command_warns_of_an_evaluated_stream(stopped, monkeypatch, capsys):
    _, run, _ = stopped
    monkeypatch.setattr("sys.argv", ["moe-jax", "evaluate", str(run.workdir)])
    main.main()
    out, err = capsys.readouterr()
    # The validation is the run's own, at distance 0 from its last one.
    assert set(json.loads(out)["alarms"]) == {"Drops", "SaturatedGates"}
    assert "warning: SaturatedGates in layer 1: the mean share of the top score" in err


def rules(folder, opened, *alarms):
    values = flags.FlagValues()
    serve.define(values)
    more = [f"--override=training.alarms={json.dumps(alarms)}"] if alarms else []
    values(["serve", f"--model={folder}", "--alarm_window=64", *more])
    return alarming.rules_of(values, alarming.experiment_of(values), opened)


def test_a_served_stream_meets_the_rules_of_the_run(stopped, tmp_path):
    _, run, _ = stopped
    opened = open_folder(run.workdir, None, lambda model: None)
    own = rules(run.workdir, opened)
    heard = [one for one in run.config.training.alarms if not isinstance(one, SaturatedGates)]
    assert list(own.alarms) == heard and own.window == 64
    assert own.references == {"": [line for line in run.metrics if line["kind"] == "eval"][-1]}
    # The served model has read the run's own validation documents, each "ab" 40 times.
    assert set(opened.tokenizer.decode(own.streams[""].tokens)) == set("ab")
    # A folder that is no run has no rules of its own and no validation.
    assert rules(tmp_path, opened) is None
    given = {"type": "Drift", "reference": str(run.workdir)}
    other = rules(tmp_path, opened, {"type": "Drift"}, given)
    assert other.references == {"": None, str(run.workdir): own.references[""]}
    (stream,) = other.streams.values()
    assert [*other.streams] == [str(run.workdir)]
    for one, same in zip(stream.layers, own.streams[""].layers, strict=True):
        np.testing.assert_array_equal(one.choices, same.choices)


def test_rules_without_evidence_in_a_served_stream_are_named_at_the_start(stopped, capsys):
    _, run, _ = stopped
    opened = open_folder(run.workdir, None, lambda model: None)
    given = [{"type": name} for name in ("SaturatedGates", "SilentBalance", "Plateau")]
    assert rules(run.workdir, opened, *given) is None
    said = capsys.readouterr()
    for rule in given:
        assert f"{rule['type']} raises no alarm here" in said.out + said.err


def test_a_wrong_reference_is_found_before_weights_are_read(stopped, tmp_path, monkeypatch, capsys):
    _, run, _ = stopped
    wrong = {"type": "Drift", "reference": str(tmp_path / "none")}
    with pytest.raises(mj.ConfigError, match="holds no validation of a run"):
        rules(run.workdir, None, wrong)

    def unexpected(*args, **options):
        raise AssertionError

    monkeypatch.setattr(FinishedRun, "weights", unexpected)
    settings = f"--config.training.alarms=({wrong!r},)"
    monkeypatch.setattr("sys.argv", ["moe-jax", "evaluate", str(run.workdir), settings])
    with pytest.raises(SystemExit):
        main.main()
    assert "holds no validation of a run" in capsys.readouterr().err


def test_the_report_lists_them(stopped):
    _, run, _ = stopped
    report = run.report.read_text()
    assert "<h2>Alarms</h2>" in report
    assert "<td>Drops</td>" in report


def test_the_weights_do_not_depend_on_alarms(stopped, tmp_path):
    _, run, data = stopped
    plain = mj.train(tiny.get_config(), tmp_path / "plain", CHANGES | data)
    same = jax.tree.map(lambda a, b: (a == b).all(), run.state.params, plain.state.params)
    assert jax.tree.all(same)


def test_a_reference_must_be_a_run_of_the_same_layers(stopped, tmp_path):
    _, run, _ = stopped
    wrong = {"type": "Drift", "reference": str(tmp_path / "none")}
    with pytest.raises(mj.ConfigError, match="holds no validation of a run"):
        mj.train(tiny.get_config(), tmp_path / "a", {**CHANGES, "training.alarms": (wrong,)})
    other = {"type": "Drift", "reference": str(run.workdir)}
    fewer = {**CHANGES, "training.alarms": (other,), "model.moe.num_experts": 2}
    with pytest.raises(mj.ConfigError, match="use a run of the same layers"):
        mj.train(tiny.get_config(), tmp_path / "a", fewer)
    assert not (tmp_path / "a").exists()
