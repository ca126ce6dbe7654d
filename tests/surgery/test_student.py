"""Students that are made of a mixture's experts, and their training with the mixture as teacher."""

import dataclasses
import re
from ast import literal_eval

import numpy as np
import pytest
from moe_jax.configs import from_hf

import moe_jax as mj
from moe_jax.errors import ConfigError
from moe_jax.surgery.api import distil
from moe_jax.surgery.evidence import Use, use_of
from moe_jax.surgery.mixture import mixtures
from moe_jax.surgery.student import (
    check_student,
    dense,
    groups,
    mean_gates,
    side_by_side,
    smaller,
)
from tests.parity.compare_models import recorded
from tests.surgery import test_api
from tests.surgery.small import batch, config, logits, weights

# Four tokens with two choices each. The experts 0 and 2 have equal logits, and so do 1 and 3.
USE = Use(
    load=np.array([3.0, 3.0, 1.0, 1.0]),
    gate=np.array([2.0, 1.0, 0.6, 0.4]),
    output=np.ones(4),
    logits=np.array([[1.0, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]),
    tokens=np.array(4.0),
)


def test_groups_and_their_gates_by_hand():
    assert groups(USE, 2, "merge").tolist() == [0, 1, 0, 1]
    assert groups(USE, 2, "prune").tolist() == [0, 1, -1, -1]
    # 2.6 and 1.4 over 4 tokens; without the members, 2:1 of the same sum.
    np.testing.assert_allclose(mean_gates(USE, groups(USE, 2, "merge")), [0.65, 0.35])
    np.testing.assert_allclose(mean_gates(USE, groups(USE, 2, "prune")), [2 / 3, 1 / 3])


def test_experts_side_by_side_add_up_with_their_gates():
    rng = np.random.default_rng(0)
    shapes = {"up": (3, 2, 4), "up_bias": (3, 1, 4), "down": (3, 4, 2), "down_bias": (3, 1, 2)}
    experts = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    gates, x = np.array([0.5, 0.3, 0.2]), rng.normal(size=(5, 2)).astype(np.float32)

    def network(up, up_bias, down, down_bias):
        return np.maximum(x @ up + up_bias, 0) @ down + down_bias

    each = [network(**{name: array[e] for name, array in experts.items()}) for e in range(3)]
    found = {name: np.asarray(array) for name, array in side_by_side(experts, gates).items()}
    assert {name: array.shape for name, array in found.items()} == {
        "up": (2, 12),
        "up_bias": (12,),
        "down": (12, 2),
        "down_bias": (2,),
    }
    wanted = sum(gate * y for gate, y in zip(gates, each, strict=True))
    np.testing.assert_allclose(network(**found), wanted, atol=1e-5)


def with_equal_gates(found):
    """The model with logits of zero: both choices of a token have gates of a half."""
    arrays = {n: a * 0 if "router/kernel" in n else a for n, a in found.arrays.items()}
    return dataclasses.replace(found, arrays=arrays)


def test_a_dense_student_of_constant_gates_computes_the_mixture():
    # Every token chooses the experts 0 and 1 with gates of a half, so both side by side are exact.
    teacher = with_equal_gates(weights(config(num_layers=1, mlp_bias=True)))
    uses = use_of(teacher, [batch()])
    np.testing.assert_array_equal(uses[0].load, [16, 16, 0, 0])
    student = dense(teacher, uses, 2, "prune")
    assert not student.model.sparse_layers() and student.model.mlp_dim == 12
    np.testing.assert_allclose(logits(student), logits(teacher), atol=2e-5)


def test_a_smaller_mixture_has_the_groups():
    teacher = weights(config())
    uses = use_of(teacher, [batch()])
    for start in ("merge", "prune"):
        student = smaller(teacher, uses, 3, start)
        assert {m.num_experts for m in mixtures(student).values()} == {3}
    down = "params/layers/0/feed_forward/experts/down"
    kept = np.sort(np.argsort(-uses[0].load, kind="stable")[:3])
    np.testing.assert_allclose(student.arrays[down], np.asarray(teacher.arrays[down])[kept])


def test_what_no_dense_model_holds_is_one_line():
    teacher = weights(config(latent_dim=5))
    with pytest.raises(ConfigError, match="does not fit a dense model of mlp_dim=6"):
        dense(teacher, use_of(teacher, [batch()]), 1, "merge")
    mixed = weights(config(every=2))  # the other layer is dense, of width 12
    with pytest.raises(ConfigError, match="layers/0.*does not fit a dense model of mlp_dim=6"):
        dense(mixed, use_of(mixed, [batch()]), 1, "merge")
    with pytest.raises(ConfigError, match="experts=5, and layer 0 has 4"):
        check_student(teacher, 5)


SMALL = test_api.SMALL | {
    "model.moe.every": 1,
    "optimizer.learning_rate": 1e-2,
    "training.log_every": 1,
    "training.steps": 20,
}


def test_students_learn_the_domain_from_their_teacher(tmp_path):
    teacher = tmp_path / "teacher"
    overrides = {"training.steps": 12, "data.mixture.seed": 3}  # another text: the domain
    with pytest.raises(ConfigError, match="holds no run"):
        distil(tmp_path, tmp_path / "none", experts=1)
    mj.train("quickstart", teacher, overrides=SMALL)
    with pytest.raises(ConfigError, match="a dense student has no router"):
        distil(teacher, tmp_path / "none", experts=1, routing=1.0)
    with pytest.raises(ConfigError, match="teacher_temperature=0"):
        distil(teacher, tmp_path / "none", experts=1, temperature=0.0)
    # With weight 1, the student of the second row learns from its teacher alone.
    for student, experts, weight in (("dense", 1, 0.5), ("mixture", 4, 1.0)):
        out = tmp_path / student
        made = distil(
            teacher,
            out,
            experts=experts,
            student=student,
            weight=weight,
            temperature=2.0,
            routing=1.0 if student == "mixture" else 0.0,
            overrides=overrides,
        )
        assert made.kind == "run" and made.parameters[1] < made.parameters[0]
        run = mj.open_run(out)
        assert run.config.training.teacher_temperature == 2 and run.step == 0
        before = run.evaluate()["loss"]
        trained = mj.train(run.config, out)
        lines = [line for line in trained.metrics if line["kind"] == "train"]
        assert len(lines) == 12 and all(line["distillation_loss"] > 0 for line in lines)
        assert trained.evaluate()["loss"] < before
        if student == "mixture":
            for group in run.config.training.routing_groups:
                assert len(group) == 8 and set(group) == set(range(4))
            assert all(line["routing_loss"] > 0 for line in lines)


def released(tmp_path, text="experts and routers of a mixture" * 20):
    """A folder of a small Mixtral with a tokenizer, and a text."""
    folder, file = tmp_path / "hf", tmp_path / "text.txt"
    folder.mkdir()
    recorded("mixtral", folder)
    test_api.add_tokenizer(folder)
    file.write_text(text)
    return folder, file


@pytest.mark.parametrize("student", ["dense", "mixture"])
def test_a_student_of_a_released_model_is_a_folder_and_says_how_to_train(student, tmp_path):
    teacher, file = released(tmp_path)
    before = test_api.files_of(teacher)
    made = distil(teacher, tmp_path / "out", experts=3, student=student, file=file, weight=0.7)
    assert test_api.files_of(teacher) == before
    assert made.kind == "hf" and made.parameters[1] < made.parameters[0]
    assert made.experts == ({} if student == "dense" else {0: 3, 1: 3})
    assert (
        f"--config=from_hf:{tmp_path / 'out'} --config.training.teacher={teacher} "
        "--config.training.teacher_weight=0.7" in str(made)
    )


def test_what_a_student_of_a_released_model_lacks_is_one_line(tmp_path):
    teacher, file = released(tmp_path)
    for options, match in (
        ({"overrides": {"training.steps": 1}}, "has no settings"),
        ({"routing": 1.0}, "a dense student has no router"),
    ):
        with pytest.raises(ConfigError, match=match):
            distil(teacher, tmp_path / "out", experts=3, file=file, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("student", ["dense", "mixture"])
def test_a_student_of_a_released_model_learns_from_it(student, tmp_path):
    teacher, file = released(tmp_path)
    routed = {"student": "mixture", "routing": 1.0} if student == "mixture" else {}
    made = distil(teacher, tmp_path / "out", experts=3, file=file, **routed)
    groups = re.search(r"--config.training.routing_groups=(\S+)'", str(made))
    assert bool(groups) == (student == "mixture")
    knowledge = {"routing_weight": 1.0, "routing_groups": groups and literal_eval(groups[1])}
    settings = {
        **({f"training.{name}": value for name, value in knowledge.items()} if routed else {}),
        "training.teacher": str(teacher),
        "training.teacher_weight": 1.0,
        "data.source": f"files:{file}",
        "data.seq_length": 16,
        "data.batch_size": 8,
        "training.steps": 6,
        "training.log_every": 1,
        "optimizer.learning_rate": 1e-3,
        "optimizer.warmup_steps": 1,
    }
    run = mj.train(from_hf.get_config(str(tmp_path / "out")), tmp_path / "run", settings)
    losses = [line["distillation_loss"] for line in run.metrics if line["kind"] == "train"]
    if student == "dense":
        assert 0 < losses[-1] < losses[0]
    else:
        assert all(line["routing_loss"] > 0 for line in run.metrics if line["kind"] == "train")
        assert run.config.training.routing_groups == knowledge["routing_groups"]
