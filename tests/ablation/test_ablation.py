import dataclasses
import functools
import importlib
from pathlib import Path

import jax
import numpy as np
import pytest

from moe_jax import data, models
from moe_jax.ablation.ablation import Claim, Finished
from moe_jax.ablation.catalogue import load
from moe_jax.ablation.runner import fingerprint, runs_of, to_train
from moe_jax.ablation.sizes import MeasuredSeries, QualityBySize
from moe_jax.errors import ConfigError
from moe_jax.parallel import MeshConfig
from moe_jax.training.state import named_leaves
from tests.ablation import tiny_changed, tiny_dependent
from tests.ablation.tiny_ablation import ABLATION

ROOT = Path(__file__).parents[2] / "experiments"
# Arms share their text, and a check reads all of it.
CHECKED = functools.cache(data.check_source)
FILES = [path for path in sorted(ROOT.glob("*/*.py")) if "ABLATION = " in path.read_text()]


def test_a_scale_and_an_arm_are_put_on_the_base():
    config = ABLATION.config("switch", "gpu", seed=3)
    assert (config.training.steps, config.model.moe.num_experts) == (8, 2)
    assert config.training.seed == config.data.seed == 3
    assert ABLATION.get_config("switch,gpu,3").to_dict() == config.to_dict()
    assert ABLATION.get_config().model.moe.every == 0  # the first arm


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"claims": (Claim("", "loss", "swich", "dense"),)}, "no arm 'swich'.*switch"),
        (
            {"sizes": QualityBySize({"": MeasuredSeries("", "dense", {0.5: "swich"})})},
            "no arm 'swich'",
        ),
        (
            {"sizes": QualityBySize({"": MeasuredSeries("", "sense", {0.5: "switch"})})},
            "no arm 'sense'",
        ),
        ({"arms": {"dense": {}, "switch": {"training.teacher": Finished("sense")}}}, "'dense'"),
        (
            {
                "arms": {
                    "dense": {"training.teacher": Finished("switch")},
                    "switch": {"training.start_from": Finished("dense")},
                }
            },
            "arm 'dense' needs its own finished run",
        ),
        ({"scales": {"cqu": {}}}, "scale 'cqu'.*cpu"),
        ({"scales": {"cpu": {"model.moe.every": 1}}}, "scale cpu changes model.moe.every"),
    ],
)
def test_a_wrong_ablation_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(ABLATION, **change)


def test_a_changed_run_is_made_once_from_its_source(tmp_path):
    ablation = tiny_changed.ABLATION
    switch, pruned, recovered = runs_of(ablation, "cpu", 1, list(ablation.arms), tmp_path)
    (change,) = pruned.needs.values()
    assert change.folder == recovered.needs["training.start_from"].folder
    assert change.source.folder == switch.folder and change.folder != switch.folder
    assert to_train([recovered, pruned]) == [switch, change, recovered, pruned]
    assert ablation.config("pruned").training.start_from == (
        "<run of arm switch after prune --experts=2 --by=load>"
    )
    # The pruned run evaluates weights that ``switch`` has trained.
    assert [ablation.weights(arm) for arm in ablation.arms] == ["switch", "switch", "recovered"]


def test_a_misspelt_setting_names_the_nearest():
    wrong = dataclasses.replace(
        ABLATION, claims=(), published=(), arms={"a": {"model.moe.evry": 0}}
    )
    with pytest.raises(ConfigError, match="evry is not a setting.*every"):
        wrong.config("a")


def test_the_fingerprint_is_of_what_changes_a_run():
    one = ABLATION.experiment("switch")
    assert fingerprint(one) == fingerprint(dataclasses.replace(one, mesh=MeshConfig(expert=2)))
    assert fingerprint(one) == fingerprint(dataclasses.replace(one, name="other"))
    others = [ABLATION.experiment("dense"), ABLATION.experiment("switch", seed=1)]
    assert len({fingerprint(found) for found in (one, *others)}) == 3


def test_runs_that_need_others_have_their_folders_and_are_named_by_what_they_compute(tmp_path):
    dependent = tiny_dependent.ABLATION
    student, teacher, tuned = runs_of(dependent, "cpu", 1, list(dependent.arms), tmp_path)
    assert student.experiment.training.teacher == str(teacher.folder)
    assert tuned.experiment.training.start_from == str(student.folder)
    assert [run.arm for run in to_train([tuned])] == ["teacher", "student", "tuned"]
    # Moved, all have the same names; a teacher that computes something else renames those after it.
    moved = runs_of(dependent, "cpu", 1, list(dependent.arms), tmp_path / "moved")
    assert [run.folder.name for run in moved] == [
        run.folder.name for run in (student, teacher, tuned)
    ]
    arms = {**dependent.arms, "teacher": {"model.moe.num_experts": 4}}
    others = runs_of(dataclasses.replace(dependent, arms=arms), "cpu", 1, list(arms), tmp_path)
    names = {run.folder.name for run in (student, teacher, tuned)}
    assert len(names | {run.folder.name for run in others}) == 6
    (shorter,) = runs_of(dependent, "cpu", 1, ["tuned"], tmp_path, steps=2)
    (needed,) = shorter.needs.values()
    assert shorter.experiment.training.steps == needed.experiment.training.steps == 2


def test_a_folder_that_nobody_gives_is_named_by_its_arm():
    config = tiny_dependent.ABLATION.get_config("student,gpu,1")
    assert config.training.teacher == "<finished run of arm teacher>"


def test_arms_of_a_seed_share_the_weights_that_are_no_experts():
    def weights(arm, seed):
        config = ABLATION.experiment(arm, seed=seed).model
        model = jax.jit(lambda: models.make(config, 40, jax.random.key(seed)))()
        return {name: np.asarray(leaf) for name, leaf in named_leaves(model).items()}

    dense, switch, other = weights("dense", 0), weights("switch", 0), weights("switch", 1)
    shared = [name for name in dense if "attention/" in name or "embedding" in name]
    assert len(shared) >= 5
    for name in shared:
        np.testing.assert_array_equal(dense[name], switch[name])
        assert (switch[name] != other[name]).any()


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_arm_of_every_ablation_is_a_run(path, monkeypatch):
    monkeypatch.setattr(data, "check_source", CHECKED)
    ablation = load(path)
    module = importlib.import_module(f"experiments.{path.parent.name}.{path.stem}")
    assert module.ABLATION.name == ablation.name
    only = {"cpu"} if path.parent.name == "pilot" else {"cpu", "gpu", "pod"}
    assert set(ablation.scales) == only
    for scale in ablation.scales:
        for arm in ablation.arms:
            experiment = ablation.experiment(arm, scale)
            if scale != "pod":  # whose corpus is not here
                experiment.check(1)
