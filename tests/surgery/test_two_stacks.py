"""Runs of encoder-decoders: upcycled by the command, trained on, converted and changed again."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import moe_jax as mj
from moe_jax import models
from moe_jax.cli import convert as convert_command
from moe_jax.cli import train as train_command
from moe_jax.cli import upcycle as upcycle_command
from moe_jax.errors import ConfigError
from moe_jax.interop import folders, native
from moe_jax.interop.huggingface import load, save
from moe_jax.surgery.evidence import use_of
from moe_jax.surgery.growth import Growth
from moe_jax.surgery.mixture import mixtures
from moe_jax.surgery.quantising import quantise
from moe_jax.surgery.source import open_source
from moe_jax.surgery.student import smaller
from moe_jax.surgery.weights import LayerWeights
from tests.parity.compare_models import recorded
from tests.surgery.small import assert_close, pair, two_stacks, weights
from tests.surgery.test_api import flags_of

SMALL = {
    "data.source": "mixture",
    "data.tokenizer": "bytes",
    "data.seq_length": 32,
    "data.target_length": 16,
    "data.batch_size": 8,
    "data.eval_documents": 4,
    "data.mixture.document_length": 64,
    "data.mixture.num_documents": 64,
    "model.encoder_layers": 2,
    "model.decoder_layers": 2,
    "model.width": 16,
    "model.num_heads": 2,
    "model.head_dim": 8,
    "model.mlp_dim": 32,
    "model.attention.scale": 1.0,  # as in T5
    "model.scan_layers": True,
    "model.encoder_moe.group_size": 32,
    "model.decoder_moe.group_size": 16,
    "optimizer.warmup_steps": 1,
    "training.checkpoint_every": 1,
    "training.eval_every": 0,
    "training.log_every": 1,
    "training.loss_chunk": 0,
    "training.steps": 1,
}
LAYERS = ("encoder 0", "encoder 1", "decoder 0", "decoder 1")
BLANK = "ab <extra_id_0> cd"


def with_flags(command, *arguments):
    """Runs a command in this process."""
    command.main(flags_of(command, *arguments))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A trained dense run."""
    folder = tmp_path_factory.mktemp("runs") / "dense"
    mj.train("span_corruption:dense", folder, overrides=SMALL)
    return folder


@pytest.fixture(scope="module")
def sparse(dense):
    """A run of four experts in each layer that came from the dense one, trained for one step."""
    folder = dense.with_name("sparse")
    with_flags(upcycle_command, f"--input={dense}", f"--output={folder}", "--experts=4")
    with_flags(train_command, f"--workdir={folder}")
    return folder


def test_an_upcycled_run_of_two_stacks_begins_as_the_dense_one_and_trains_on(dense, sparse):
    one, other = mj.open_run(dense), mj.open_run(sparse, step=0)
    assert [layer.name for layer in other.config.model.sparse_layers()] == list(LAYERS)
    assert_close(open_source(dense).weights, open_source(sparse, 0).weights)
    assert other.evaluate()["loss"] == pytest.approx(one.evaluate()["loss"], rel=1e-5)
    trained = mj.open_run(sparse)
    assert trained.step == 1 and np.isfinite(trained.evaluate()["loss"])
    assert [line["step"] for line in trained.metrics if line["kind"] == "train"] == [1]
    assert isinstance(trained.generate(BLANK, tokens=3, temperature=0.0), str)


def test_a_switch_of_upcycled_layers_converts(dense, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "hf"
    flags = (f"--input={dense}", f"--output={run}", "--layers=encoder 1,decoder 1")
    with_flags(upcycle_command, *flags, "--experts=4", "--router=switch")
    assert "with 4 experts in 2 layers; the function differs: its gates" in capsys.readouterr().out
    flags = ("--from=moe_jax", f"--input={run}", f"--output={out}", "--family=switch_transformers")
    with_flags(convert_command, *flags)
    assert_close(open_source(run).weights, LayerWeights.of_model(mj.load_hf(out).model))
    described = json.loads((out / "config.json").read_text())
    assert described["num_experts"] == 4 and described["num_sparse_decoder_layers"] == 1


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--layers=encoder"], "--layers=encoder is no list of layers such as 1,3 or 'encoder 1"),
        (["--layers=2"], "layer 2 does not exist: the layers are encoder 0, encoder 1, decoder 0"),
        (["--router=switch", "--k=2"], "router 'switch' has no choice 'k'"),
        (["--shards=3"], "shards=3 does not divide model.mlp_dim=32"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(dense, tmp_path, flags, match):
    with pytest.raises(ConfigError, match=match) as error:
        given = (f"--input={dense}", f"--output={tmp_path / 'out'}", *flags)
        with_flags(upcycle_command, *given)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_experts_of_both_stacks_are_distilled_and_grown():
    found = weights(two_stacks())
    student = smaller(found, use_of(found, [pair()]), 3, "merge")
    assert {name: a.shape for name, a in student.arrays.items()} == student.shapes
    assert {m.num_experts for m in mixtures(student).values()} == {3}
    grown, reason = Growth(copies=2, layers=[1])(found)
    numbers = {name: m.num_experts for name, m in mixtures(grown).items()}
    assert numbers == {**dict.fromkeys(mixtures(found), 4), "encoder 1": 8, "decoder 1": 8}
    assert not reason
    assert_close(found, grown)


def taken(run, out):
    """The newest model of a run with expert 2 of step 0 in layer 1 of both stacks."""
    return mj.take_experts(run, out, other=run, other_step=0, experts=[2], layers=[1])


CHANGES = {
    "dense": (lambda run, out: mj.distil(run, out, experts=2, batches=1), {}),
    "mixture": (
        lambda run, out: mj.distil(run, out, experts=3, student="mixture", routing=0.1, batches=1),
        dict.fromkeys(LAYERS, 3),
    ),
    "grow": (
        lambda run, out: mj.grow(run, out, copies=2, layers=["decoder 1"]),
        {**dict.fromkeys(LAYERS, 4), "decoder 1": 8},
    ),
    "take": (taken, dict.fromkeys(LAYERS, 4)),
    "quantise": (
        lambda run, out: quantise(run, out, bits="int8", calibration="validation", batches=1),
        dict.fromkeys(LAYERS, 4),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_run_of_two_stacks_is_a_run(sparse, tmp_path, change):
    make, experts = CHANGES[change]
    out = tmp_path / "out"
    made = make(sparse, out)
    run = mj.open_run(out)
    found = {layer.name: layer.moe.num_experts for layer in run.config.model.sparse_layers()}
    assert run.step == 0 and found == experts
    if change == "grow":
        assert_close(open_source(sparse).weights, open_source(out).weights)
    elif change == "take":
        changes = mj.diff_experts(sparse, out)
        differing = [(one.layer, one.expert) for one in changes if not one.equal]
        assert differing == [("encoder 1", 2), ("decoder 1", 2)]
    elif change == "quantise":
        assert 0 < made.difference.logits_error < 0.05
    trained = mj.train(run.config, out)
    assert trained.step == 1 and np.isfinite(trained.metrics[0]["loss"])
    assert isinstance(trained.generate(BLANK, tokens=2, temperature=0.0), str)


@pytest.mark.parametrize(
    ("case", "flags", "kind"),
    [
        ("switch_transformers", ["--router=switch"], "hf"),
        ("switch_transformers", ["--router=mixtral", "--k=1"], "moe_jax"),
        ("nllb_moe", ["--shards=2"], "moe_jax"),
    ],
    ids=["switch", "mixtral", "nllb"],
)
def test_a_dense_folder_of_transformers_is_upcycled(tmp_path, case, flags, kind):
    (tmp_path / "released").mkdir()
    recorded(case, tmp_path / "released")
    released = load(tmp_path / "released")
    moe = dataclasses.replace(released.config.encoder_moe, layers=(), every=0)
    config = dataclasses.replace(released.config, encoder_moe=moe, decoder_moe=moe)
    dense, out = tmp_path / "dense", tmp_path / "out"
    save(models.make(config, 43, jax.random.key(0)), dense, released.family)
    assert not load(dense).config.sparse_layers()
    with_flags(
        upcycle_command,
        f"--input={dense}",
        f"--output={out}",
        "--experts=4",
        "--layers=1,3",
        *flags,
    )
    assert folders.kind_of(out) == kind
    found = load(out) if kind == "hf" else native.load(out)
    names = ["encoder 1", "encoder 3", "decoder 1", "decoder 3"]
    assert [layer.name for layer in found.config.sparse_layers()] == names
    if flags != ["--router=switch"]:  # the gates of a Switch do not sum to one
        assert_close(LayerWeights.of_model(load(dense).model), LayerWeights.of_model(found.model))
