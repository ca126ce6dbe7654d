import dataclasses
import datetime
import json
import threading

import pytest

from moe_jax import files
from moe_jax.config.experiment import Experiment, TrainingConfig
from moe_jax.config.optimizer import Adafactor, OptimizerConfig
from moe_jax.config.schedules import Linear
from moe_jax.errors import ConfigError
from moe_jax.models import DecoderConfig
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.parallel import MeshConfig
from moe_jax.routing.presets import gshard, switch
from moe_jax.run import workdir

_RUN = Experiment("run")


def test_claimed_folder_gives_the_experiment_back(tmp_path):
    folder = tmp_path / "new" / "run"
    workdir.claim(folder, _RUN)
    assert workdir.load(folder) == _RUN
    saved = json.loads((folder / "config.json").read_text())
    assert saved.keys() == {"config", "versions", "git_commit"}
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_one_process_at_a_time_may_train_there(tmp_path):
    with workdir.locked(tmp_path / "run"):
        with (
            pytest.raises(ConfigError, match="another process is training in .*run: wait"),
            workdir.locked(tmp_path / "run"),
        ):
            pass
        with workdir.locked(tmp_path / "other"):
            pass
    with workdir.locked(tmp_path / "run"):
        pass


def test_a_lock_can_be_waited_for(tmp_path):
    order = []

    def wait():
        with workdir.locked(tmp_path, wait=True):
            order.append("waited")

    waiting = threading.Thread(target=wait)
    with workdir.locked(tmp_path):
        waiting.start()
        waiting.join(0.2)
        order.append("done")
    waiting.join()
    assert order == ["done", "waited"]


def test_the_same_experiment_may_claim_again(tmp_path):
    workdir.claim(tmp_path, _RUN)
    workdir.claim(tmp_path, _RUN)


def test_a_run_whose_corpus_has_changed_is_refused(tmp_path):
    corpus = {"training": 40, "validation": 2, "sha256": "a" * 64}
    workdir.claim(tmp_path, _RUN)
    workdir.claim_corpus(tmp_path, corpus)
    # The next start keeps the record.
    workdir.claim(tmp_path, _RUN)
    workdir.claim_corpus(tmp_path, corpus)
    changed = corpus | {"sha256": "b" * 64}
    with pytest.raises(ConfigError, match="'python_library' has changed .*aaaa.*bbbb") as error:
        workdir.claim_corpus(tmp_path, changed)
    assert "\n" not in str(error.value)


def test_a_run_on_an_older_library_is_refused_once_it_has_checkpoints(tmp_path):
    corpus = {"training": 40, "validation": 2, "sha256": "a" * 64}
    workdir.claim(tmp_path, _RUN)
    (tmp_path / "checkpoints").mkdir()
    for check in (workdir.claim_corpus, workdir.check_corpus):
        with pytest.raises(ConfigError, match="version 1.0.0 of python_library"):
            check(tmp_path, corpus)


def test_a_corpus_is_checked_without_being_written(tmp_path):
    corpus = {"training": 40, "validation": 2, "sha256": "a" * 64}
    workdir.claim(tmp_path, _RUN)
    before = (tmp_path / "config.json").read_bytes()
    # A run that has recorded no text, and has no checkpoint, may read any.
    workdir.check_corpus(tmp_path, corpus)
    assert (tmp_path / "config.json").read_bytes() == before
    workdir.claim_corpus(tmp_path, corpus)
    workdir.check_corpus(tmp_path, corpus)
    with pytest.raises(ConfigError, match="'python_library' has changed"):
        workdir.check_corpus(tmp_path, corpus | {"sha256": "b" * 64})


_RATES = {
    "training": TrainingConfig(steps=2000),
    "optimizer": OptimizerConfig(learning_rate=0.5, warmup_steps=7, schedule=Linear()),
}


def _with_checkpoint(folder, step):
    (folder / "checkpoints" / str(step)).mkdir(parents=True)


def test_a_change_is_refused_without_its_flag_and_the_line_names_the_flag(tmp_path):
    workdir.claim(tmp_path, _RUN)
    other = dataclasses.replace(_RUN, training=TrainingConfig(steps=2000))
    line = "training.steps: 1000 there, 2000 here.: add --change to go on, or use another --workdir"
    with pytest.raises(ConfigError, match=line):
        workdir.claim(tmp_path, other)
    assert workdir.load(tmp_path) == _RUN


def test_a_change_of_steps_and_rates_is_recorded_and_ends_the_result(tmp_path):
    workdir.claim(tmp_path, _RUN)
    _with_checkpoint(tmp_path, 1000)
    (tmp_path / "result.json").write_text("{}")
    other = dataclasses.replace(_RUN, **_RATES)
    for _ in range(2):  # the second time, nothing differs any more
        workdir.claim(tmp_path, other, change=True)
    assert workdir.load(tmp_path) == other
    assert not (tmp_path / "result.json").exists()
    (change,) = json.loads((tmp_path / "config.json").read_text())["changes"]
    assert change["step"] == 1000
    assert change["settings"] == {
        "optimizer.learning_rate": [0.001, 0.5],
        "optimizer.schedule.final": [0.1, 0.0],
        "optimizer.schedule.type": ["Cosine", "Linear"],
        "optimizer.warmup_steps": [100, 7],
        "training.steps": [1000, 2000],
    }
    assert datetime.datetime.fromisoformat(change["time"]).tzinfo is not None
    # A run of the new settings goes on without the flag, and a second change is added.
    workdir.claim(tmp_path, other)
    third = dataclasses.replace(other, training=TrainingConfig(steps=3000))
    workdir.claim(tmp_path, third, change=True)
    changes = json.loads((tmp_path / "config.json").read_text())["changes"]
    assert [one["settings"].get("training.steps") for one in changes] == [
        [1000, 2000],
        [2000, 3000],
    ]


def test_a_finished_run_keeps_its_result_if_nothing_changes(tmp_path):
    workdir.claim(tmp_path, _RUN)
    (tmp_path / "result.json").write_text("{}")
    assert workdir.claim(tmp_path, _RUN, change=True) is None
    assert (tmp_path / "result.json").exists()


def test_a_finished_run_keeps_the_versions_and_the_command_that_trained_it(tmp_path):
    workdir.claim(tmp_path, _RUN, command="moe-jax train quickstart")
    path = tmp_path / "config.json"
    trained = json.loads(path.read_text()) | {"versions": {"jax": "0.1"}, "git_commit": "0123"}
    path.write_text(json.dumps(trained))
    (tmp_path / "result.json").write_text("{}")
    workdir.claim(tmp_path, _RUN, command="another command")
    assert json.loads(path.read_text()) == trained
    (tmp_path / "result.json").unlink()
    workdir.claim(tmp_path, _RUN, command="another command")
    again = json.loads(path.read_text())
    assert again["command"] == "another command" and again["versions"] != trained["versions"]


@pytest.mark.parametrize(
    "other",
    [
        {"training": TrainingConfig(steps=2000, seed=1)},
        {"optimizer": OptimizerConfig(Adafactor())},
        {"optimizer": OptimizerConfig(ema_decay=0.9)},
    ],
    ids=str,
)
def test_a_change_of_anything_else_is_refused_with_the_flag_too(tmp_path, other):
    workdir.claim(tmp_path, _RUN)
    with pytest.raises(ConfigError, match=r"\): use another --workdir, or delete it"):
        workdir.claim(tmp_path, dataclasses.replace(_RUN, **other), change=True)


@pytest.mark.parametrize("steps", [500, 1000])
def test_a_changed_run_needs_steps_to_train(tmp_path, steps):
    workdir.claim(tmp_path, _RUN)
    _with_checkpoint(tmp_path, 1000)
    training = TrainingConfig(steps=steps)
    other = dataclasses.replace(_RUN, training=training, optimizer=_RATES["optimizer"])
    with pytest.raises(ConfigError, match="trained to step 1000 already: set training.steps above"):
        workdir.claim(tmp_path, other, change=True)


def test_settings_that_are_newer_than_a_run_do_not_end_it(tmp_path):
    workdir.claim(tmp_path, _RUN)
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["config"]["training"]["teacher"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    workdir.claim(tmp_path, _RUN)
    assert workdir.load(tmp_path) == _RUN


@pytest.mark.parametrize(
    "change",
    [
        {"mesh": MeshConfig(4, 2)},
        {"training": TrainingConfig(log_every=3, eval_every=7, checkpoint_every=9)},
        {"training": TrainingConfig(keep_last=5, keep_every=100)},
    ],
)
def test_what_moves_or_observes_a_run_may_change(tmp_path, change):
    other = dataclasses.replace(_RUN, **change)
    workdir.claim(tmp_path, _RUN)
    workdir.claim(tmp_path, other)
    # Those who read the run afterwards find it as it was last.
    assert workdir.load(tmp_path) == other


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"name": "other"}, "name: run there, other here"),
        ({"training": TrainingConfig(steps=7)}, "training.steps: 1000 there, 7 here"),
        ({"training": TrainingConfig(seed=1)}, "training.seed: 0 there, 1 here"),
        (
            {"optimizer": OptimizerConfig(Adafactor())},
            "optimizer.rule.type: AdamW there, Adafactor here",
        ),
        (
            {"model": DecoderConfig(moe=MoEConfig(router=switch(capacity_factor=3.0)))},
            "model.moe.router.capacity.factor: 1.25 there, 3.0 here",
        ),
        (
            {"model": DecoderConfig(moe=MoEConfig(router=switch(z_weight=0.5)))},
            "model.moe.router.balance.1.weight: unset there, 0.5 here",
        ),
        (
            {"model": DecoderConfig(moe=MoEConfig(router=gshard()))},
            "model.moe.router.select.type: TopK there, Top2 here",
        ),
    ],
)
def test_another_experiment_is_refused_with_the_difference(tmp_path, change, difference):
    workdir.claim(tmp_path, _RUN)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ConfigError) as error:
        workdir.claim(tmp_path, dataclasses.replace(_RUN, **change))
    assert difference in str(error.value)
    assert "\n" not in str(error.value)
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        workdir.load(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("read", [workdir.load, lambda folder: workdir.claim(folder, _RUN)])
def test_damaged_config_is_named(tmp_path, read):
    (tmp_path / "config.json").write_text('{"config": {')
    with pytest.raises(ConfigError, match=r"config.json is damaged"):
        read(tmp_path)


def test_a_lost_config_of_a_run_with_checkpoints_is_named(tmp_path, caplog):
    (tmp_path / "checkpoints" / "20").mkdir(parents=True)
    workdir.claim(tmp_path, _RUN)
    assert "config.json is missing: the run goes on with the settings" in caplog.text
    caplog.clear()
    workdir.claim(tmp_path, _RUN)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "was not written by a run"),
        (b"{}", "was not written by a run"),
        (b"\xff\xfe", r"is damaged .*: restore it"),
    ],
)
def test_a_config_that_holds_none_is_named(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=f"config.json {message}"):
        workdir.load(tmp_path)


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "deep" / "x.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


@pytest.mark.parametrize(
    "text",
    ["[]", "3", "{}", '{"config": 3}', '{"architectures": ["X"]}', '{"config": {}, "sources": 1}'],
)
def test_a_config_json_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="config.json was not written by a run"):
        workdir.load(tmp_path)
    with pytest.raises(ConfigError, match="config.json was not written by a run"):
        workdir.claim(tmp_path, _RUN)
    assert (tmp_path / "config.json").read_text() == text


@pytest.mark.parametrize("content", [b"", b"{", bytes([0xFF, 0xFE, 0])])
def test_a_garbled_config_json_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match="config.json is damaged"):
        workdir.load(tmp_path)


def test_a_config_json_with_unknown_settings_names_the_file(tmp_path):
    (tmp_path / "config.json").write_text('{"config": {"name": "x", "modle": {}}}')
    with pytest.raises(ConfigError, match="config.json cannot be read: config.modle is not"):
        workdir.load(tmp_path)


def test_a_path_that_cannot_be_a_folder_is_refused_before_anything_is_made(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for path in (file, file / "run", file / "a" / "b"):
        with pytest.raises(ConfigError, match=f"cannot be a folder, as {file} is a file"):
            workdir.check_folder(path)
    workdir.check_folder(tmp_path / "new" / "run")
    assert sorted(tmp_path.iterdir()) == [file]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir.files.os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match=f"as {tmp_path} is not writable"):
        workdir.check_folder(tmp_path / "run")


def test_files_and_folders_in_each_others_place_are_named(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(ConfigError, match="checkpoints is a file"):
        workdir.check_folder(tmp_path)
    (tmp_path / "checkpoints").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match="config.json is a folder"):
        workdir.check_folder(tmp_path)
    with pytest.raises(ConfigError, match="config.json is a folder"):
        workdir.load(tmp_path)
