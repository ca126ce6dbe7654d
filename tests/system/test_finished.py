"""What a finished run leaves in its folder, and what reads it."""

import json
import math
import re
import shutil
import struct
import subprocess

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

import moe_jax as mj
from moe_jax.config.experiment import Experiment
from moe_jax.config.schema import build
from moe_jax.decoding import Sampling
from moe_jax.errors import ConfigError
from moe_jax.run.evaluation import changed
from moe_jax.run.restored import open_restored
from moe_jax.run.sampling import generate
from moe_jax.run.scoring import open_model, scores
from moe_jax.training.metrics import flatten, read_metrics
from tests.system.runs import CONFIG, ROOT, command, error_line, records, train


@pytest.fixture(scope="module")
def run(whole):
    return whole()


@pytest.fixture(scope="module")
def restored(run):
    return open_restored(run.folder)


def _read(path):
    return json.loads(path.read_text())


def _events(folder):
    """Every event in TensorBoard's files: records of length, checksum, bytes, checksum."""
    for path in sorted(folder.glob("events.out.tfevents.*")):
        content, position = path.read_bytes(), 0
        while position < len(content):
            (length,) = struct.unpack_from("<Q", content, position)
            yield Event.FromString(content[position + 12 : position + 12 + length])
            position += 12 + length + 4


def test_training_in_a_folder_without_permission_is_one_line(run, protected):
    done = command(
        "tests.system.unprivileged", "moe_jax.train", *run.flags, f"--workdir={protected}"
    )
    assert str(protected) in error_line(done)


def test_started_again_it_says_that_it_is_finished(run, tmp_path):
    folder = shutil.copytree(run.folder, tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    # Where it runs and how often it reports may change.
    other = ("--config.training.log_every=7", "--config.mesh.data=4", "--config.mesh.expert=2")
    done = train(folder, *run.flags, *other, devices=8)
    assert done.stdout == f"{folder} is finished; its results are in {folder}/report.html\n"
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    changed = {path.name for path in before | after if before.get(path) != after.get(path)}
    assert changed <= {"config.json"}


def test_refuses_another_configuration(run):
    config = (run.folder / "config.json").read_bytes()
    other = "--config.optimizer.learning_rate=0.5"
    line = error_line(
        command("moe_jax.train", f"--workdir={run.folder}", *run.flags, other, devices=1)
    )
    assert "optimizer.learning_rate: 0.003 there, 0.5 here" in line
    assert line.count(" there, ") == 1
    assert (run.folder / "config.json").read_bytes() == config


def test_config_makes_the_same_experiment(run):
    saved = _read(run.folder / "config.json")
    experiment = build(Experiment, saved["config"])
    assert experiment.name == "tiny-switch"
    assert (experiment.training.steps, experiment.model.dropout) == (40, 0.1)
    assert experiment.model.moe.router.input_jitter == 0.01
    assert {"jax", "flax", "optax", "python"} <= saved["versions"].keys()
    assert saved["versions"]["jax"] == jax.__version__
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    assert saved["git_commit"] == (head.stdout.strip() if head.returncode == 0 else None)


def test_metrics_have_every_field(run):
    lines = [r for r in read_metrics(run.folder) if r["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, 41))
    for line in lines:
        numbers = ("loss", "objective", "grad_norm", "learning_rate", "tokens_per_second")
        assert all(math.isfinite(line[name]) for name in numbers)
        assert 0 <= line["dropped_fraction"] <= 1
        (layer,) = line["layers"]
        assert layer["layer"] == 1
        assert layer["losses"].keys() == {"balance"}
        assert len(layer["load"]) == 4
        assert sum(layer["load"]) == pytest.approx(1)
        assert 1 <= layer["max_mean_load"] <= 4
        assert layer["max_violation"] == pytest.approx(layer["max_mean_load"] - 1)
        assert 0 < layer["load_entropy"] <= 1
        # The only MoE layer, so its drops are the model's.
        assert layer["dropped_fraction"] == line["dropped_fraction"]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5


def test_learning_rate_warms_up_and_decays(run):
    rates = [record["learning_rate"] for record in records(run.folder)]
    assert rates[:5] == pytest.approx([6e-4, 12e-4, 18e-4, 24e-4, 30e-4])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] < 1e-4


def test_evaluates_on_the_way_and_at_the_end(run):
    assert [record["step"] for record in records(run.folder, "eval")] == [20, 40]


def test_tensorboard_holds_the_metrics(run):
    found = {
        (event.step, value.tag): value.simple_value
        for event in _events(run.folder / "tensorboard")
        for value in event.summary.value
    }
    expected = {
        (record["step"], f"{record['kind']}/{name}"): np.float32(number)
        for record in read_metrics(run.folder)
        for name, number in flatten(record).items()
        if name != "step"
    }
    assert {"train/loss", "train/layers/0/losses/balance", "eval/bits_per_byte"} <= {
        tag for _, tag in expected
    }
    assert found == expected


def test_keeps_the_newest_checkpoints(run):
    names = {path.name for path in (run.folder / "checkpoints").iterdir()}
    assert names == {"30", "40"}


def test_report_needs_no_network(run):
    text = (run.folder / "report.html").read_text()
    assert "<svg" in text
    assert "tiny-switch" in text
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//""", text)
    assert not re.search(r"""url\(\s*["']?(https?:)?//|@import|<script|<link""", text)


def test_result_stands_beside_baselines(run):
    result = _read(run.folder / "result.json")
    assert result["baselines"].keys() == {"uniform", "order2", "zlib"}
    assert result["baselines"]["uniform"] == 8
    assert (result["steps"], result["tokens"], result["skipped_updates"]) == (40, 40 * 8 * 32, 0)
    assert result["active_parameters"] < result["total_parameters"]
    record = records(run.folder, "eval")[-1]
    assert {name: result[name] for name in record.keys() - {"kind", "step"}} == {
        name: value for name, value in record.items() if name not in ("kind", "step")
    }
    assert f"validation bits per byte: {result['bits_per_byte']:.3f}" in run.stdout


def test_expert_tokens_are_counted(run):
    (layer,) = _read(run.folder / "expert_tokens.json")["layers"]
    assert layer["layer"] == 1
    assert len(layer["experts"]) == 4
    tops = [token for expert in layer["experts"] for token in expert]
    assert all(token["count"] > 0 and 0 < token["share"] <= 1 for token in tops)


@pytest.fixture(scope="module")
def protected(run, tmp_path_factory):
    """A copy of the run in which nothing may be written."""
    folder = shutil.copytree(run.folder, tmp_path_factory.mktemp("protected") / "run")
    paths = [folder, *folder.rglob("*")]
    for path in paths:
        path.chmod(path.stat().st_mode & ~0o222)
    yield folder
    for path in paths:
        path.chmod(path.stat().st_mode | 0o200)


def _read_only(module, *arguments):
    return command("tests.system.unprivileged", f"moe_jax.{module}", *arguments)


def test_evaluate_only_reads_and_prints_the_final_record(run, protected):
    done = _read_only("evaluate", f"--workdir={protected}")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    record = json.loads(line)
    assert {"loss", "bits_per_byte", "accuracy"} <= record.keys()
    assert {"dropped_fraction", "load"} <= record["layers"][0].keys()
    final = records(run.folder, "eval")[-1]
    assert {"kind": "eval", **record} == final


def test_evaluate_on_other_devices_agrees(restored, run):
    _, session, state = restored
    assert session.mesh.size == 8
    with jax.set_mesh(session.mesh):
        loss = session.evaluate(state)["loss"]
    assert loss == pytest.approx(records(run.folder, "eval")[-1]["loss"], rel=1e-6)


def test_an_earlier_step_is_opened_by_its_number(run):
    # The run saves steps 10, 20, 30 and 40 and keeps the last two.
    middle, last = records(run.folder, "eval")
    opened = mj.open_run(run.folder, step=30)
    assert opened.step == 30
    assert last["loss"] < opened.evaluate()["loss"] < middle["loss"]
    # The commands have the same choice; a step without a checkpoint is one line.
    wrong = command("moe_jax.evaluate", f"--workdir={run.folder}", "--step=7")
    assert "has no checkpoint of step 7; it has 30, 40" in error_line(wrong)


def test_generate_only_reads_and_continues_the_prompt_alike_for_a_seed(protected):
    flags = (f"--workdir={protected}", "--prompt=def ", "--tokens=12", "--samples=2")
    first, second = (_read_only("generate", *flags) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("def ")
    assert first.stdout.count("def ") >= 2
    assert first.stdout == second.stdout


def test_what_evaluates_and_generates_refuses_a_corpus_that_has_changed(run, tmp_path):
    folder = shutil.copytree(run.folder, tmp_path / "run")
    saved = _read(folder / "config.json")
    saved["corpus"]["sha256"] = "0" * 64
    (folder / "config.json").write_text(json.dumps(saved))
    # Both commands open a run this way.
    with pytest.raises(ConfigError, match="has changed since the run in .* began") as error:
        open_restored(folder)
    assert "\n" not in str(error.value)
    assert _read(folder / "config.json") == saved


def test_generate_follows_seed_and_temperature(restored):
    _, session, state = restored

    def sample(**choices):
        with jax.set_mesh(session.mesh):
            return generate(session, state, ["def "], Sampling(tokens=12, **choices))

    assert sample(seed=1) != sample(seed=2)
    best = sample(temperature=0.0, seed=1)
    assert best == sample(temperature=0.0, seed=2)
    assert best[0].startswith("def ")


def test_generate_refuses_a_model_that_sees_the_future(source, tmp_path):
    folder = tmp_path / "leaking"
    train(folder, f"{CONFIG}:expert_choice", source, "--config.training.steps=1")
    line = error_line(command("moe_jax.generate", f"--workdir={folder}"))
    assert "experts choose among tokens, later ones included" in line


def test_it_is_evaluated_on_other_text_and_with_another_capacity(run, restored, tmp_path):
    _, session, state = restored
    own = session.evaluate(state)
    (tmp_path / "a.txt").write_text("import this\n" * 40)
    other = mj.open_run(run.folder, overrides={"data.source": f"files:{tmp_path}/*.txt"})
    assert other.evaluate()["loss"] != own["loss"]
    # With a slot for every token, no token is dropped; with few slots, many are.
    factors = {factor: _evaluated(run, factor)["dropped_fraction"] for factor in (0.25, 4.0)}
    assert factors[4.0] == 0.0 < own["dropped_fraction"] < factors[0.25]


def _evaluated(run, factor):
    _, session, state = open_restored(run.folder, change=lambda one: changed(one, {}, factor))
    with jax.set_mesh(session.mesh):
        return session.evaluate(state)


def test_commands_evaluate_with_other_settings_and_score_texts(run, restored, tmp_path):
    evaluate = ("moe_jax", "evaluate", f"--workdir={run.folder}")
    done = command(*evaluate, "--capacity-factor=4", "--config.data.eval_documents=2")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["dropped_fraction"] == 0.0
    width = command(*evaluate, "--config.model.width=32")
    assert "change the parameters of the model" in error_line(width)

    texts = ["import this\n" * 9, "def f(x):"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "texts.jsonl").write_text(lines)
    file = f"--file={tmp_path / 'texts.jsonl'}"
    done = command("moe_jax", "score", f"--model={run.folder}", file, "--window=16")
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["document"], line["bytes"]) for line in found] == [(0, 108), (1, 9)]
    here = list(scores(open_model(run.folder), texts, window=16))
    for line, score in zip(found, here, strict=True):
        assert line["token_ids"] == list(score.tokens)
        np.testing.assert_allclose(
            line["token_log_likelihoods"], score.log_likelihoods, rtol=1e-4, atol=1e-4
        )
        assert line["log_likelihood"] == pytest.approx(sum(line["token_log_likelihoods"]))
