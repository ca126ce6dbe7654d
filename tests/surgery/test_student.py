"""Students that are made of a mixture's experts, and their training with the mixture as teacher."""

import dataclasses
import re
from ast import literal_eval

import jax
import numpy as np
import pytest
from flax import nnx
from moe_jax.configs import from_hf

import moe_jax as mj
from moe_jax import routing
from moe_jax.errors import ConfigError
from moe_jax.nn.mode import Mode
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.norm import NormConfig
from moe_jax.nn.shared import SharedConfig
from moe_jax.surgery.api import distil
from moe_jax.surgery.evidence import Use, use_of
from moe_jax.surgery.mixture import mixtures
from moe_jax.surgery.prune import check_number
from moe_jax.surgery.student import (
    dense,
    dense_model,
    groups,
    mean_gates,
    one_network,
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
    mix=np.array([4.0, 1.0]),
)


def test_groups_and_their_gates_by_hand():
    assert groups(USE, 2, "merge").tolist() == [0, 1, 0, 1]
    assert groups(USE, 2, "prune").tolist() == [0, 1, -1, -1]
    # 2.6 and 1.4 over 4 tokens; without the members, 2:1 of the same sum.
    np.testing.assert_allclose(mean_gates(USE, groups(USE, 2, "merge")), [0.65, 0.35])
    np.testing.assert_allclose(mean_gates(USE, groups(USE, 2, "prune")), [2 / 3, 1 / 3])


def test_one_network_has_the_units_of_experts_and_of_shared_experts():
    # Tokens of width 1; each expert has one hidden unit.
    moe = MoEConfig(every=1, num_experts=4, expert_dim=1, router=routing.preset("mixtral"))
    column = np.float32([2, 3, 4, 5])[:, None, None]
    routed = {"experts/up": column, "experts/down": 10 * column}
    shared = {
        "shared/network/up": np.float32([[7, 8]]),
        "shared/network/down": np.float32([[1, 2]]).T,
    }
    group = groups(USE, 2, "prune")  # the experts 0 and 1, with mean gates of 2/3 and 1/3

    def found(arrays, **changes):
        one = one_network(dataclasses.replace(moe, **changes), arrays, USE, group)
        return np.ravel(one["up"]), np.ravel(one["down"])

    up, down = found(routed)
    np.testing.assert_allclose(up, [2, 3])
    np.testing.assert_allclose(down, [20 * 2 / 3, 30 / 3], rtol=1e-6)
    # The shared gate has a mean of 1/4, and at test time masks leave 1/2 and 4/5 of the outputs.
    gated = SharedConfig(2, mix="sigmoid")
    up, down = found(routed | shared, shared=gated, expert_mask=0.5, final_mask=0.2)
    np.testing.assert_allclose(up, [2, 3, 7, 8])
    np.testing.assert_allclose(down, [20 / 3 * 0.8, 5 * 0.8, 0.8 / 4, 2 * 0.8 / 4], rtol=1e-6)
    # Projections of the factors 3 and 5 are in the input and in the output weights.
    latent = {"latent/down": np.float32([[3]]), "latent/up": np.float32([[5]])}
    up, down = found(routed | latent, latent_dim=1)
    np.testing.assert_allclose(up, [6, 9])
    np.testing.assert_allclose(down, [200 / 3, 50], rtol=1e-6)


def test_gates_on_inputs_are_in_the_input_weights():
    router = dataclasses.replace(routing.preset("mixtral"), gate_on="in")
    moe = MoEConfig(every=1, num_experts=4, expert_dim=1, router=router)
    column = np.float32([2, 3, 4, 5])[:, None, None]
    arrays = {"experts/up": column, "experts/up_bias": column, "experts/down": column}
    arrays["experts/down_bias"] = column
    found = one_network(moe, arrays, USE, groups(USE, 2, "prune"))
    # Three of four tokens choose expert 0, and three choose expert 1; mean gates are 2/3 and 1/3.
    np.testing.assert_allclose(found["up"], [[4 / 3, 1]], rtol=1e-6)
    np.testing.assert_allclose(found["up_bias"], [2, 3])
    # Both have half of the two choices of a token.
    np.testing.assert_allclose(found["down"], [[2], [3]])
    np.testing.assert_allclose(found["down_bias"], [5])


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


def of_one_token(found):
    """The logits of a text in which all tokens are equal, and the statistics of its gates."""
    text = batch()
    text["inputs"] = np.full_like(text["inputs"], 3)
    graph, state = nnx.split(found.module())

    @jax.jit
    def computed(state):
        model = nnx.merge(graph, state)
        return model.logits(model.read(text, mode=Mode("full")).hidden)

    return np.asarray(computed(state)), lambda: use_of(found, [text])


# The hidden width of the student: two experts of width 6, shared experts of width 10, or the other
# dense layer of width 12.
KINDS = {
    "shared": (22, {"shared": SharedConfig(10), "mlp_bias": True}),
    "shared_gate": (22, {"shared": SharedConfig(10, mix="sigmoid")}),
    "two_gates": (22, {"shared": SharedConfig(10, mix="softmax")}),
    "conditional": (22, {"shared": SharedConfig(10, mix="conditional")}),
    "norms": (22, {"shared": SharedConfig(10, norms=True), "norm": NormConfig(place="both")}),
    "wider_layer": (15, {"every": 2, "num_layers": 2, "mlp_dim": 15}),
    "narrower_layer": (22, {"every": 2, "num_layers": 2, "shared": SharedConfig(10)}),
    "layer_without_gate": (12, {"every": 2, "num_layers": 2, "gated": True, "mlp_up_offset": 0.5}),
    "latent": (12, {"latent_dim": 5, "mlp_bias": True}),
    "limit": (22, {"shared": SharedConfig(10), "mlp_limit": 0.5, "mlp_up_offset": 1.0}),
    "gates_on_inputs": (12, {"mlp_bias": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_student_is_exact_on_a_text_of_equal_tokens(kind):
    # Equal tokens have equal gates, so that the means of all gates are the gates of every token.
    width, changes = KINDS[kind]
    router = routing.preset("mixtral")
    if kind == "gates_on_inputs":
        router = dataclasses.replace(router, gate_on="in")
    model = config(router, **{"num_layers": 1} | changes)
    if kind == "layer_without_gate":  # as in GLaM
        model = dataclasses.replace(model, moe=dataclasses.replace(model.moe, gated=False))
    teacher = weights(model)
    expected, uses = of_one_token(teacher)
    student = dense(teacher, uses(), 2, "prune")
    assert not student.model.sparse_layers() and student.model.mlp_dim == width
    assert {name: array.shape for name, array in student.arrays.items()} == student.shapes
    np.testing.assert_allclose(of_one_token(student)[0], expected, atol=5e-6)


def test_a_router_that_reads_logits_and_its_free_experts_are_left_out_of_a_dense_student():
    teacher = weights(config(routing.preset("moe_plus_plus")))
    uses = use_of(teacher, [batch()])
    student = dense(teacher, uses, 2, "merge")
    assert {name: array.shape for name, array in student.arrays.items()} == student.shapes
    # A smaller mixture keeps the router and its free experts.
    check_number(teacher, 2)
    mixture = smaller(teacher, uses, 2, "merge")
    assert {name: array.shape for name, array in mixture.arrays.items()} == mixture.shapes
    assert [layer.moe.num_experts for layer in mixture.model.sparse_layers()] == [2, 2]


def test_what_no_dense_model_holds_is_one_line():
    norms = {"shared": SharedConfig(4, norms=True)}
    mixed = config(every=2, gated=True, mlp_limit=7.0)
    for model, experts, match in (
        (config(), 5, "experts=5, and layer 0 has 4: use a number from 1 to 4"),
        (config(), 0, "experts=0, and layer 0 has 4"),
        (config(extra_dense="after"), 1, "layer 0.*extra_dense=after.*use --student=mixture"),
        (config(**norms, norm=NormConfig("layer")), 1, "norms.*norm.kind=rms"),
        (config(**norms, norm=NormConfig(place="output")), 1, "norms.*norm.place=input or both"),
        (
            dataclasses.replace(mixed, moe=dataclasses.replace(mixed.moe, gated=False)),
            1,
            "model.mlp_limit=7.0 bounds gated units.*use --student=mixture",
        ),
    ):
        with pytest.raises(ConfigError, match=match) as error:
            dense_model(weights(model), experts)
        assert "\n" not in str(error.value)


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


def test_a_dense_student_of_shared_experts_and_dense_layers_trains_and_generates(tmp_path):
    teacher, out = tmp_path / "teacher", tmp_path / "student"
    layers = {"model.moe.every": 2, "model.moe.expert_dim": 12, "model.moe.latent_dim": 8}
    shared = {"model.moe.shared.hidden": 24, "model.moe.shared.mix": "sigmoid"}
    mj.train("quickstart", teacher, overrides=SMALL | layers | shared)
    made = distil(teacher, out, experts=2, overrides={"training.steps": 8})
    assert made.kind == "run" and made.experts == {}
    run = mj.open_run(out)
    # Two experts and the shared one have 48 units, and the dense layer gets as many.
    assert run.config.model.mlp_dim == 48
    before = run.evaluate()["loss"]
    trained = mj.train(run.config, out)
    assert trained.evaluate()["loss"] < before
    assert trained.generate("abc", tokens=4).startswith("abc")


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
    made = distil(teacher, tmp_path / "out", experts=3, student=student, file=file, weight=0.0)
    assert test_api.files_of(teacher) == before
    assert made.kind == "hf" and made.parameters[1] < made.parameters[0]
    assert made.experts == ({} if student == "dense" else {0: 3, 1: 3})
    settings = "teacher_weight=0.0 --config.training.teacher_temperature=1.0"
    assert (
        f"--config=from_hf:{tmp_path / 'out'} --config.training.teacher={teacher} "
        f"--config.training.{settings}" in str(made)
    )


def test_what_a_student_of_a_released_model_lacks_is_one_line(tmp_path):
    teacher, file = released(tmp_path)
    for options, match in (
        ({"overrides": {"training.steps": 1}}, "has no settings"),
        ({"routing": 1.0}, "a dense student has no router"),
        ({"temperature": 0.0, "file": "absent.txt"}, "teacher_temperature"),
        ({"family": "mixtral", "file": "absent.txt"}, "mixtral"),  # before a text is read
    ):
        with pytest.raises(ConfigError, match=match):
            distil(teacher, tmp_path / "out", experts=3, **{"file": file, **options})
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
