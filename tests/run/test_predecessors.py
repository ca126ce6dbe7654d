"""What a run reads of another one that is finished, and what it refuses."""

import dataclasses
import functools
import shutil

import jax
import numpy as np
import pytest

from moe_jax import data, files
from moe_jax.config.experiment import Experiment, TrainingConfig
from moe_jax.data.tokenizers import Bytes, train_sentencepiece
from moe_jax.errors import ConfigError
from moe_jax.parallel import MeshConfig
from moe_jax.routing.presets import loss_free
from moe_jax.run import workdir
from moe_jax.run.predecessors import open_finished, open_sources
from moe_jax.run.session import open_checkpoints, open_session
from moe_jax.training.state import named_leaves
from moe_jax.training.transplant import WEIGHTS
from tests.training.test_step import bits, made, model

MODEL = model(loss_free(), every=2)
DATA = data.DataConfig("mixture", tokenizer="bytes", seq_length=16, batch_size=16)
RUN = Experiment("old", MODEL, DATA, training=TrainingConfig(steps=3))


@functools.cache
def text():
    """A tokenizer of 300 pieces."""

    class Lines(list):
        def domain(self, index):
            return 0

    return train_sentencepiece(Lines([f"def f{i}(x): return {i} * x\n" for i in range(300)]), 300)


def write(folder, experiment=RUN, tokenizer=None, seed=0):
    """A folder as a finished run leaves it; returns every array of its state."""
    tokenizer = tokenizer or Bytes()
    workdir.claim(folder, experiment)
    tokenizer.save(folder)
    session = open_session(experiment, tokenizer)
    _, state = made(dataclasses.replace(session.recipe, seed=seed))
    rng = np.random.default_rng(seed)
    leaves = {
        name: jax.device_put(rng.normal(size=x.shape).astype(x.dtype), x.sharding)
        for name, x in named_leaves(state).items()
        if name != "key"
    } | {"key": state.key}
    with open_checkpoints(experiment, folder / workdir.CHECKPOINTS) as checkpoints:
        checkpoints.save(3, leaves, {"position": 3})
    files.write_json(folder / workdir.RESULT, {"loss": 1.0})
    return {name: np.asarray(leaf) for name, leaf in leaves.items()}


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "old"
    return folder, write(folder)


def new(**changes):
    """A run that changes this of its training, model, data or mesh."""
    parts = {"training": {}, "model": {}, "data": {}}
    for name, value in changes.items():
        part, _, key = name.partition("__")
        parts[part][key] = value
    made_of = {
        part: dataclasses.replace(getattr(RUN, part), **values) for part, values in parts.items()
    }
    return dataclasses.replace(RUN, name="new", **made_of)


def test_all_weights_are_those_of_the_other_run_on_another_mesh(old, tmp_path):
    folder, leaves = old
    experiment = new(training__start_from=str(folder), training__teacher=str(folder))
    experiment = dataclasses.replace(experiment, mesh=MeshConfig(2, 2, 1, 2))
    sources = open_sources(experiment, tmp_path)
    session = sources.joined(open_session(experiment, sources.tokenizer))
    found = named_leaves(session.first_state())
    taught = named_leaves(
        {"params": session.teacher.params} | {"router_state": session.teacher.router_state}
    )
    names = {name for name in found if name.startswith(WEIGHTS)}
    assert taught.keys() == names
    assert any("bias" in name for name in names)
    for name in names:
        assert bits(found[name]) == bits(taught[name]) == bits(leaves[name]), name
    experts = next(name for name in names if name.endswith("experts/up"))
    for leaf in (found[experts], taught[experts]):
        assert leaf.addressable_shards[0].data.size == leaf.size // 4
    assert not any(np.any(x) for n, x in found.items() if n.startswith("opt_state"))
    assert found["step"] == 0


def test_a_run_that_has_begun_reads_no_weights_to_start_from(old, tmp_path):
    folder = shutil.copytree(old[0], tmp_path / "old")
    experiment = new(training__start_from=str(folder))
    mine = tmp_path / "new"
    sources = open_sources(experiment, mine)
    workdir.claim(mine, experiment, sources.identities)
    with open_checkpoints(experiment, mine / workdir.CHECKPOINTS) as checkpoints:
        checkpoints.save(1, {"x": jax.numpy.zeros(1)}, {})
    shutil.rmtree(folder)
    sources = open_sources(experiment, mine)
    assert sources.start is None and sources.tokenizer is None
    workdir.claim(mine, experiment, sources.identities)
    with pytest.raises(ConfigError, match="training.start_from: weights .* there,  here"):
        workdir.claim(mine, new())


def test_folders_may_move_and_their_weights_must_stay(old, tmp_path):
    folder = shutil.copytree(old[0], tmp_path / "one")
    experiment = new(training__teacher=str(folder))
    sources = open_sources(experiment, tmp_path / "new")
    workdir.claim(tmp_path / "new", experiment, sources.identities)
    moved = new(training__teacher=str(folder.rename(tmp_path / "two")))
    sources = open_sources(moved, tmp_path / "new")
    workdir.claim(tmp_path / "new", moved, sources.identities)
    assert workdir.load(tmp_path / "new") == moved
    write(tmp_path / "three", seed=1)
    other = new(training__teacher=str(tmp_path / "three"))
    sources = open_sources(other, tmp_path / "new")
    with pytest.raises(ConfigError, match="training.teacher: weights .* there, weights .* here"):
        workdir.claim(tmp_path / "new", other, sources.identities)


def test_reading_changes_nothing_there(old, tmp_path):
    folder = old[0]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    experiment = new(training__teacher=str(folder))
    sources = open_sources(experiment, tmp_path)
    sources.joined(open_session(experiment, sources.tokenizer))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_one_that_is_not_finished_is_refused(old, tmp_path):
    with pytest.raises(ConfigError, match="training.teacher: .*nowhere holds no run"):
        open_finished("training.teacher", "/nowhere")
    folder = shutil.copytree(old[0], tmp_path / "old")
    (folder / workdir.RESULT).unlink()
    with pytest.raises(ConfigError, match="training.teacher=.* is not finished"):
        open_finished("training.teacher", str(folder))


MOE = MODEL.moe
SPANS = data.DataConfig(
    "mixture", tokenizer="bytes", spans=data.Spans(sentinels=8), seq_length=16, target_length=16
)
REFUSED = {
    "width": (
        {"training__start_from": "", "model__width": 24},
        r"params/embedding/table is float32\[259,16\] there and float32\[259,24\] here \(\d+ diff",
    ),
    "text": (
        {"training__teacher": "", "data__tokenizer": "sentencepiece"},
        "another tokenizer: this run has data.tokenizer='sentencepiece'; set it to 'bytes'",
    ),
    "sentinels": (
        {
            "training__start_from": "",
            "data__spans": SPANS.spans,
            "data__target_length": SPANS.target_length,
        },
        "the other run has 0 sentinels and this run 8",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_one_line(old, tmp_path, case):
    changes, message = REFUSED[case]
    changes = {k: str(old[0]) if v == "" else v for k, v in changes.items()}
    with pytest.raises(ConfigError, match=message) as error:
        open_sources(new(**changes), tmp_path)
    assert "\n" not in str(error.value)


def test_a_teacher_that_the_mesh_cannot_hold_is_refused(tmp_path):
    six = dataclasses.replace(
        RUN, model=dataclasses.replace(MODEL, moe=dataclasses.replace(MOE, num_experts=6))
    )
    write(tmp_path / "six", six)
    experiment = new(training__teacher=str(tmp_path / "six"))
    experiment = dataclasses.replace(experiment, mesh=MeshConfig(2, 4))
    with pytest.raises(ConfigError, match="training.teacher=.*num_experts=6 .* mesh.expert=4"):
        open_sources(experiment, tmp_path / "new")


def test_two_tokenizers_and_two_sizes_are_refused(old, tmp_path):
    sizes = dataclasses.replace(DATA, tokenizer="sentencepiece", vocab_size=300)
    write(tmp_path / "text", dataclasses.replace(RUN, data=sizes), text())
    there = str(tmp_path / "text")
    same = new(training__teacher=there, data__tokenizer="sentencepiece", data__vocab_size=300)
    assert open_sources(same, tmp_path / "new").tokenizer.vocab_size == text().vocab_size
    larger = new(training__teacher=there, data__tokenizer="sentencepiece", data__vocab_size=400)
    with pytest.raises(ConfigError, match="data.vocab_size=400; set it to 300"):
        open_sources(larger, tmp_path / "new")
    both = new(training__teacher=there, training__start_from=str(old[0]))
    with pytest.raises(ConfigError, match="another tokenizer"):
        open_sources(both, tmp_path / "new")
