"""What a user does wrong is answered by one line, before anything is written."""

import json
import subprocess
import sys

import pytest

from tests.system.runs import CONFIG, ROOT, TIMEOUT, command, environment, error_line

# Flags beside --config and the corpus, and what the line must say; 8 devices are there.
_CASES = {
    "misspelt group": (["--config.modle.width=8"], ["config.modle is not a setting", "'model'"]),
    "misspelt key": (
        ["--config.training.step=8"],
        ["config.training.step is not a setting", "'steps'"],
    ),
    "no such router": (["--config.model.moe.router.preset=swich"], ["'swich'", "'switch'"]),
    "bad type": (["--config.training.steps=many"], ["steps", "many"]),
    "fraction of a step": (["--config.training.steps=1.5"], ["steps", "1.5"]),
    "bad choice": (["--config.model.remat=some"], ["model.remat", "'some'", "full"]),
    "out of range": (["--config.training.steps=0"], ["training.steps=0"]),
    "no such dataset": (["--config.data.source=lm1bb"], ["lm1bb", "lm1b"]),
    "not prepared": (
        ["--config.data.source=lm1b", "--config.data.data_dir=/nowhere"],
        ["lm1b", "/nowhere"],
    ),
    "no such file": (["--config.data.source=files:/nowhere/*.txt"], ["/nowhere/*.txt"]),
    "experts over mesh": (
        ["--config.model.moe.num_experts=6", "--config.mesh.expert=4"],
        ["model.moe.num_experts=6", "mesh.expert=4"],
    ),
    "sorted choices over mesh": (
        ["--config.model.moe.transport=ragged", "--config.mesh.expert=4"],
        ["transport='ragged'", "mesh.expert=4", "exchange='ragged'"],
    ),
    "devices": (["--config.mesh.data=3"], ["mesh data=3", "8 devices"]),
    "batch": (["--config.data.batch_size=12"], ["data.batch_size=12", "multiple of 8"]),
    "loss chunk": (["--config.training.loss_chunk=5"], ["training.loss_chunk=5"]),
    "group": (["--config.model.moe.group_size=48"], ["model.moe.group_size=48"]),
    "heads over mesh": (["--config.mesh.model=4"], ["model.num_heads=2", "mesh.model=4"]),
    "leak": (["--config.model.moe.router.preset=expert_choice"], ["allow_future_leak"]),
    "extra argument": (["steps=3"], ["'steps=3'"]),
    "no other processes": (["--distributed"], ["Slurm", "pass --coordinator=HOST:PORT"]),
    "process alone": (["--process_id=1"], ["--process_id", "add --distributed"]),
    "streams": (["--config.data.streams=3"], ["data.batch_size=8", "data.streams=3"]),
    "no teacher": (["--config.training.teacher=/nowhere"], ["training.teacher", "/nowhere"]),
    "nothing to start from": (
        ["--config.training.start_from=/nowhere"],
        ["training.start_from", "/nowhere", "holds no run"],
    ),
    "no such start": (["--config.training.start_with=some"], ["'some'", "all, shared"]),
    "weight of the teacher": (["--config.training.teacher_weight=2.0"], ["teacher_weight=2.0"]),
    "unknown flag": (["--wrokdir=x"], ["wrokdir"]),
}


@pytest.fixture(scope="module")
def answers(source, tmp_path_factory):
    """What each case answers, and its folder."""
    folder = tmp_path_factory.mktemp("errors")
    folders = {name: folder / name.replace(" ", "_") for name in _CASES}
    lines = [[CONFIG, source, f"--workdir={folders[name]}", *_CASES[name][0]] for name in _CASES]
    done = subprocess.run(
        [sys.executable, "-m", "tests.system.forked"],
        cwd=ROOT,
        env=environment(8),
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=True,
    )
    found = [subprocess.CompletedProcess((), *answer) for answer in json.loads(done.stdout)]
    return {name: (one, folders[name]) for name, one in zip(_CASES, found, strict=True)}


@pytest.mark.parametrize("case", _CASES)
def test_mistake_is_one_line_and_leaves_nothing(answers, case):
    done, folder = answers[case]
    line = error_line(done)
    for part in _CASES[case][1]:
        assert part in line
    assert not folder.exists()


def test_unknown_variant_names_the_known_ones(tmp_path):
    folder = f"--workdir={tmp_path / 'run'}"
    line = error_line(command("moe_jax.train", "--config=configs/quickstart.py:swich", folder))
    assert "'swich'" in line
    assert "switch, dense, gshard, expert_choice" in line
    assert not (tmp_path / "run").exists()


def test_missing_config_file_is_named(tmp_path):
    folder = f"--workdir={tmp_path / 'run'}"
    line = error_line(command("moe_jax.train", "--config=configs/nothing.py", folder))
    assert "configs/nothing.py" in line
    assert not (tmp_path / "run").exists()


def test_config_is_asked_for(tmp_path):
    line = error_line(command("moe_jax.train", f"--workdir={tmp_path / 'run'}"))
    assert "--config" in line
    assert not (tmp_path / "run").exists()


def test_workdir_that_is_a_file_is_named(source, tmp_path):
    path = tmp_path / "run"
    path.touch()
    line = error_line(command("moe_jax.train", CONFIG, source, f"--workdir={path}"))
    assert str(path) in line


def test_workdir_is_asked_for(source):
    assert "--workdir" in error_line(command("moe_jax.train", CONFIG, source))


@pytest.mark.parametrize("module", ["evaluate", "generate"])
def test_readers_ask_for_a_trained_run(module, tmp_path):
    line = error_line(command(f"moe_jax.{module}", f"--workdir={tmp_path / 'run'}"))
    assert "holds no run" in line
    assert not (tmp_path / "run").exists()
