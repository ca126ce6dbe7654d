"""Folders in, folders out: runs that train and generate on, and models of transformers."""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

import moe_jax as mj
from moe_jax import models, signals
from moe_jax.cli import convert as convert_command
from moe_jax.cli import grow as grow_command
from moe_jax.cli import train as train_command
from moe_jax.errors import ConfigError
from moe_jax.interop import native
from moe_jax.interop.huggingface import load, save
from moe_jax.parallel import MeshConfig, make_mesh
from moe_jax.run import session
from moe_jax.run.exported import open_trained
from moe_jax.surgery.api import grow, merge, prune, upcycle
from moe_jax.surgery.mixture import mixtures
from moe_jax.surgery.source import open_source
from moe_jax.surgery.weights import LayerWeights
from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.state import named_leaves
from tests.parity.compare_models import recorded
from tests.surgery.small import assert_close

SMALL = {
    "data.source": "mixture",
    "data.tokenizer": "bytes",
    "data.seq_length": 32,
    "data.batch_size": 8,
    "data.eval_documents": 4,
    "data.mixture.document_length": 64,
    "data.mixture.num_documents": 64,
    "model.num_layers": 2,
    "model.width": 16,
    "model.num_heads": 2,
    "model.head_dim": 8,
    "model.mlp_dim": 32,
    "model.scan_layers": True,
    "model.moe.group_size": 32,
    "optimizer.warmup_steps": 1,
    "training.loss_chunk": 0,
    "training.steps": 1,
}


def files_of(folder):
    """A hash of every file of a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A trained dense run."""
    folder = tmp_path_factory.mktemp("runs") / "dense"
    mj.train("quickstart:dense", folder, overrides=SMALL)
    return folder


@pytest.fixture(scope="module")
def sparse(dense):
    """A run of four experts per layer that came from the dense one."""
    folder = dense.with_name("sparse")
    upcycle(dense, folder, experts=4, overrides={"training.steps": 2})
    return folder


def test_an_upcycled_run_begins_as_the_dense_one_and_trains_on(dense, sparse):
    one, other = mj.open_run(dense), mj.open_run(sparse)
    assert (one.step, other.step, other.config.model.moe.num_experts) == (1, 0, 4)
    assert other.evaluate()["loss"] == pytest.approx(one.evaluate()["loss"], rel=1e-6)
    trained = mj.train(other.config, sparse)
    assert trained.step == 2 and [m["step"] for m in trained.metrics if m["kind"] == "train"] == [2]
    assert len(trained.generate("abc", tokens=3)) > 3


@pytest.mark.parametrize(
    ("change", "experts"),
    [
        (lambda run, out: prune(run, out, experts=3, by="loss", batches=1), 3),
        (lambda run, out: prune(run, out, experts=2, by="output", batches=1), 2),
        (lambda run, out: merge(run, out, experts=3, batches=1), 3),
        (lambda run, out: grow(run, out, copies=2), 8),
        (lambda run, out: grow(run, out, parts=2, noise=0.1), 8),
        (lambda run, out: grow(run, out, hidden=40), 4),
    ],
    ids=["loss", "output", "merge", "copies", "parts", "hidden"],
)
def test_a_changed_run_is_a_run_and_its_source_is_untouched(sparse, tmp_path, change, experts):
    before = files_of(sparse)
    changed = change(sparse, tmp_path / "out")
    assert files_of(sparse) == before and changed.kind == "run"
    run = mj.open_run(tmp_path / "out")
    assert run.step == 0 and run.config.model.moe.num_experts == experts
    anew = run.session.optimizer.init(run.state.params)
    jax.tree.map(np.testing.assert_array_equal, run.state.opt_state, anew)
    assert np.isfinite(run.evaluate()["loss"])
    assert mj.train(run.config, tmp_path / "out").step == 2
    if not changed.difference:
        start = mj.open_run(sparse).evaluate()["loss"]
        assert run.evaluate()["loss"] == pytest.approx(start, rel=1e-5)


def first_loss(folder):
    """The loss of the first step of a written run, before its update."""
    trained = mj.train(mj.open_run(folder).config, folder)
    return next(line["loss"] for line in trained.metrics if line["kind"] == "train")


def test_a_mesh_splits_the_new_experts(sparse, tmp_path, monkeypatch):
    settings = {"training.steps": 1, "training.log_every": 1}
    grow(sparse, tmp_path / "split", copies=2, overrides=settings | {"mesh.expert": 2})
    grow(sparse, tmp_path / "one", copies=2, overrides=settings)
    state = mj.open_run(tmp_path / "split").state
    experts = {n: x for n, x in named_leaves(state).items() if "/experts/" in n}
    assert len(experts) == 3 * 2  # two matrices, and two moments of each
    for name, array in experts.items():
        axis = array.shape.index(8)  # four experts, twice
        half = (*array.shape[:axis], 4, *array.shape[axis + 1 :])
        shards = array.addressable_shards
        assert len(shards) == 8 and {shard.data.shape for shard in shards} == {half}, name
    split = first_loss(tmp_path / "split")
    with monkeypatch.context() as patch:
        patch.setattr(session, "make_mesh", lambda _: make_mesh(MeshConfig(), jax.devices()[:1]))
        one = mj.open_run(tmp_path / "one").state
        assert {len(x.addressable_shards) for x in jax.tree.leaves(one.params)} == {1}
        assert split == pytest.approx(first_loss(tmp_path / "one"), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "experts", "step"),
    [
        (lambda run, out, more: prune(run, out, experts=2, batches=1, overrides=more), 2, 0),
        (lambda run, out, more: merge(run, out, experts=2, batches=1, overrides=more), 2, 0),
        (
            lambda run, out, more: prune(
                run, out, experts=2, batches=1, optimizer="keep", overrides=more
            ),
            2,
            2,
        ),
        (
            lambda run, out, more: upcycle(run.with_name("dense"), out, experts=4, overrides=more),
            4,
            0,
        ),
    ],
    ids=["prune", "merge", "keep", "upcycle"],
)
def test_a_mesh_splits_the_changed_experts(sparse, tmp_path, change, experts, step):
    mj.train(mj.open_run(sparse).config, sparse)  # to its last step, if no other test has
    settings = {"training.steps": 3, "mesh.expert": 2}
    change(sparse, tmp_path / "out", settings)
    run = mj.open_run(tmp_path / "out")
    assert run.step == step
    for name, array in named_leaves(run.state).items():
        if "/experts/" not in name:
            continue
        assert array.shape[:2] == (2, experts), name  # layers, experts
        half = (2, experts // 2, *array.shape[2:])
        shards = array.addressable_shards
        assert len(shards) == 8 and {shard.data.shape for shard in shards} == {half}, name
    assert np.isfinite(run.evaluate()["loss"])


@pytest.fixture(scope="module")
def expressible(tmp_path_factory):
    """A trained run that began with a model of transformers, whose family can hold it."""
    folder = tmp_path_factory.mktemp("expressible")
    (folder / "hf").mkdir()
    recorded("mixtral", folder / "hf")
    add_tokenizer(folder / "hf")
    text = json.dumps({"text": "experts of a mixture" * 4}) + "\n"
    (folder / "text.jsonl").write_text(40 * text)
    settings = {
        "data.source": f"files:{folder / 'text.jsonl'}",
        "data.data_dir": str(folder / "data"),
        "data.seq_length": 32,
        "data.batch_size": 8,
        "optimizer.warmup_steps": 1,
        "training.steps": 1,
        "training.loss_chunk": 0,
    }
    mj.train(f"from_hf:{folder / 'hf'}", folder / "run", settings)
    return folder / "run"


@pytest.mark.parametrize(
    ("change", "experts"),
    [
        (lambda run, out: prune(run, out, experts=3, batches=1), 3),
        (lambda run, out: merge(run, out, experts=3, batches=1), 3),
        (lambda run, out: grow(run, out, parts=2), 10),
    ],
    ids=["prune", "merge", "grow"],
)
def test_a_changed_run_converts_on(expressible, tmp_path, change, experts):
    run, out, back = (tmp_path / name for name in ("run", "hf", "back"))
    change(expressible, run)
    convert_command.main(
        flags_of(convert_command, "--from=moe_jax", f"--input={run}", f"--output={out}")
    )
    assert json.loads((out / "config.json").read_text())["num_local_experts"] == experts
    convert_command.main(
        flags_of(convert_command, "--from=hf", f"--input={out}", f"--output={back}")
    )
    changed = open_source(run).weights
    for found in (load(out), native.load(back)):
        assert found.config.moe.num_experts == experts and found.family == "mixtral"
        assert_close(changed, LayerWeights.of_model(found.model))


def test_a_run_of_redirected_logits_trains_and_becomes_a_folder_of_its_own(sparse, tmp_path):
    changed = merge(sparse, tmp_path / "out", experts=2, batches=1, across=True, redirect=True)
    assert changed.kind == "run" and sum(changed.experts.values()) == 4
    run = mj.open_run(tmp_path / "out")
    of_layers = [layer.moe.router.redirect for layer in run.config.model.sparse_layers()]
    assert [len(redirect) for redirect in of_layers] == [4, 4]
    assert np.isfinite(run.evaluate()["loss"])
    trained = mj.train(run.config, tmp_path / "out")
    assert trained.step == 2 and len(trained.generate("abc", tokens=3)) > 3
    with pytest.raises(ConfigError, match="cannot express"):
        open_trained(tmp_path / "out", "mixtral")
    with pytest.raises(ConfigError, match="share the logits of their members"):
        prune(tmp_path / "out", tmp_path / "again", experts=1)


@pytest.mark.parametrize("change", [prune, merge])
def test_layers_of_different_width_are_ranked_together_and_merged_alone(sparse, tmp_path, change):
    grow(sparse, tmp_path / "wide", hidden=40, layers=[1])
    changed = change(tmp_path / "wide", tmp_path / "out", experts=3, batches=1, across=True)
    assert sum(changed.experts.values()) == 6 and min(changed.experts.values()) >= 2
    weights = open_source(tmp_path / "out").weights
    widths = {name: mixture.experts["down"].shape for name, mixture in mixtures(weights).items()}
    assert widths == {name: (changed.experts[name], f, 16) for name, f in ((0, 32), (1, 40))}
    assert np.isfinite(mj.open_run(tmp_path / "out").evaluate()["loss"])


@pytest.mark.parametrize("number", [2, 15])
def test_a_stopped_write_leaves_nothing(sparse, tmp_path, monkeypatch, number):
    def stopped(*_, **__):
        raise signals.Interrupted(number)

    monkeypatch.setattr(Checkpoints, "save", stopped)
    with pytest.raises(signals.Interrupted):
        grow(sparse, tmp_path / "out", hidden=40)
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_write_of_a_run_that_goes_on_leaves_nothing(sparse, tmp_path, monkeypatch):
    mj.train(mj.open_run(sparse).config, sparse)
    before = files_of(sparse)

    def stopped(*_, **__):
        raise signals.Interrupted(2)

    monkeypatch.setattr(Checkpoints, "save", stopped)
    with pytest.raises(signals.Interrupted):
        prune(sparse, tmp_path / "out", experts=3, batches=1, optimizer="keep")
    assert list(tmp_path.iterdir()) == [] and files_of(sparse) == before


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda run, out: prune(run, out, experts=1), "k=2 experts per token, but there are 1"),
        (lambda run, out: merge(run, out, experts=4), "layer 0 has 4: keep at least 1 and fewer"),
        (lambda run, out: upcycle(run, out), "has experts already"),
        (lambda run, out: grow(run, out), "give exactly one of copies, parts, hidden, copy: 0"),
        (lambda run, out: grow(run, out, parts=2, hidden=9), "give exactly one of .*: 2 are given"),
        (lambda run, out: grow(run, out, copies=2, layers=[5]), "layer 5 has no experts"),
        (lambda run, out: grow(run, out, copies=2, family="mixtral"), "leave --family out"),
        (
            lambda run, out: grow(run, out, copies=2, overrides={"model.width": 8}),
            "these settings change the parameters of the model",
        ),
        (
            lambda run, out: grow(run, out, copy=[0], overrides={"mesh.expert": 2}),
            "num_experts=5 is not divisible by mesh.expert=2",
        ),
        # Nobody has read the text, which is missing.
        (
            lambda run, out: prune(
                run, out, experts=2, file="missing.txt", overrides={"model.width": 8}
            ),
            "these settings change the parameters of the model",
        ),
        (
            lambda run, out: prune(
                run, out, experts=3, file="missing.txt", overrides={"mesh.expert": 2}
            ),
            "num_experts=3 is not divisible by mesh.expert=2",
        ),
        (
            lambda run, out: merge(run, out, experts=3, redirect=True, file="x", family="mixtral"),
            "leave --family out",
        ),
        (lambda run, out: prune(run.parent, out, experts=2), "holds no run, no converted model"),
        (lambda run, out: prune(run, run, experts=2), "is not empty: give another --output"),
        (lambda run, out: prune(run, out, experts=2, by="taste"), "by='taste' is none of load"),
        (lambda run, out: upcycle(run, out, router="mixtrall"), "unknown router 'mixtrall'"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(sparse, tmp_path, change, match):
    with pytest.raises(ConfigError, match=match) as error:
        change(sparse, tmp_path / "out")
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


@pytest.fixture
def mixtral(tmp_path):
    """A folder of transformers without a tokenizer."""
    (tmp_path / "hf").mkdir()
    recorded("mixtral", tmp_path / "hf")
    return tmp_path / "hf"


def test_a_stopped_write_of_a_model_of_transformers_leaves_nothing(mixtral, tmp_path, monkeypatch):
    def stopped(path, text, *_, **__):
        assert [one.name for one in path.parent.glob("*.safetensors")] == ["model.safetensors"]
        raise signals.Interrupted(2)

    # The description is written after the weights, and a folder without it is no model.
    monkeypatch.setattr(Path, "write_text", stopped)
    with pytest.raises(signals.Interrupted):
        grow(mixtral, tmp_path / "out", parts=2)
    assert list(tmp_path.iterdir()) == [mixtral]


def test_a_model_of_transformers_stays_one(mixtral, tmp_path):
    changed = grow(mixtral, tmp_path / "out", parts=2)
    assert (changed.kind, changed.difference) == ("hf", "")
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert described["num_local_experts"] == 10 and described["num_experts_per_tok"] == 4
    one, other = mj.load_hf(mixtral), mj.load_hf(tmp_path / "out")
    tokens = [[1, 2, 3, 4]]
    np.testing.assert_allclose(one.logits(tokens), other.logits(tokens), atol=1e-5)


def test_a_model_that_no_family_expresses_is_a_converted_one(mixtral, tmp_path):
    changed = grow(mixtral, tmp_path / "out", parts=2, layers=[1])
    assert changed.kind == "moe_jax" and changed.experts == {0: 5, 1: 10}
    with pytest.raises(ConfigError, match="mixtral cannot express"):
        grow(mixtral, tmp_path / "other", parts=2, layers=[1], family="mixtral")
    for change in (prune, functools.partial(merge, redirect=True)):
        with pytest.raises(ConfigError, match="gpt_oss cannot express"):
            change(mixtral, tmp_path / "other", experts=3, file="missing.txt", family="gpt_oss")
    with pytest.raises(ConfigError, match="has no validation set: give a text"):
        prune(mixtral, tmp_path / "other", experts=3)
    with pytest.raises(ConfigError, match="has no tokenizer"):
        prune(mixtral, tmp_path / "other", experts=3, file=__file__)
    assert not (tmp_path / "other").exists()


def add_tokenizer(folder):
    """Writes a tokenizer of single letters into a folder of transformers."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {chr(97 + i): i for i in range(26)} | {"<s>": 26, "</s>": 27, "<pad>": 28}
    tokenizer = Tokenizer(models.WordLevel({**vocabulary, "<unk>": 29}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))


def test_a_text_is_read_by_the_experts_of_a_released_model(mixtral, tmp_path):
    add_tokenizer(mixtral)
    (tmp_path / "text.txt").write_text("experts and routers of a mixture" * 20)
    changed = prune(mixtral, tmp_path / "out", experts=3, file=tmp_path / "text.txt", by="gate")
    assert changed.kind == "hf" and load(tmp_path / "out").config.moe.num_experts == 3
    assert (tmp_path / "out" / "tokenizer.json").exists()
    merged = merge(mixtral, tmp_path / "own", experts=3, file=tmp_path / "text.txt", across=True)
    numbers = list(merged.experts.values())
    assert sum(numbers) == 3 * len(numbers) and min(numbers) >= 2
    assert merged.kind == ("hf" if len(set(numbers)) == 1 else "moe_jax")
    options = {"experts": 1, "file": tmp_path / "text.txt", "redirect": True}
    assert merge(mixtral, tmp_path / "redirected", **options).kind == "moe_jax"
    loaded = native.load(tmp_path / "redirected")
    assert loaded.config.moe.num_experts == 1 and loaded.config.moe.router.redirect == (0,) * 5
    with pytest.raises(ConfigError, match="mixtral cannot express"):
        save(loaded.model, tmp_path / "hf", "mixtral", original=loaded.original)


def flags_of(command, *arguments):
    """The parsed flags of a command."""
    values = flags.FlagValues()
    command.define(values)
    values([command.__name__, *arguments])
    return values


def test_commands_read_their_flags(mixtral, tmp_path, capsys):
    folders = (f"--input={mixtral}", f"--output={tmp_path / 'out'}")
    arguments = (*folders, "--copy=0,3", "--layers=0,1")
    grow_command.main(flags_of(grow_command, *arguments))
    assert (
        "with 7 experts in 2 layers; the function differs: a copy takes" in capsys.readouterr().out
    )
    with pytest.raises(ConfigError, match="--copy=a is no list of numbers such as 1,3"):
        grow_command.main(flags_of(grow_command, *folders, "--copy=a"))
    with pytest.raises(ConfigError, match="is no run and has no settings"):
        given = flags_of(grow_command, *arguments, "--override=training.steps=3")
        grow_command.main(given)


def test_a_run_trains_on_without_its_config(sparse):
    given = flags_of(train_command, f"--workdir={sparse}", "--override=training.steps=3")
    experiment, overrides = train_command._experiment_of(given, sparse)
    assert overrides == {"training.steps": 3} and experiment.model.moe.num_experts == 4
    with pytest.raises(ConfigError, match="--config is missing"):
        train_command._experiment_of(given, sparse.parent)


def test_new_data_of_a_run_is_read_before_it_is_recorded(sparse, tmp_path):
    grow(sparse, tmp_path / "out", hidden=40, overrides={"data.mixture.seed": 7})
    old, new = (json.loads((p / "config.json").read_text()) for p in (sparse, tmp_path / "out"))
    assert new["corpus"]["sha256"] != old["corpus"]["sha256"]
    assert mj.open_run(tmp_path / "out").config.data.mixture.seed == 7


@pytest.mark.parametrize(
    ("case", "kind", "family"),
    [
        ("llama", "moe_jax", ""),  # biases of attention, which no family with experts has
        ("qwen2", "moe_jax", ""),
        ("qwen3", "hf", "qwen3_moe"),
    ],
)
def test_a_dense_model_of_transformers_is_upcycled(tmp_path, case, kind, family):
    (tmp_path / "dense").mkdir()
    recorded(case, tmp_path / "dense")
    before = files_of(tmp_path / "dense")
    changed = upcycle(tmp_path / "dense", tmp_path / "out", experts=4, k=2, shards=2)
    assert files_of(tmp_path / "dense") == before
    assert (changed.kind, changed.difference) == (kind, "")
    if family:
        assert mj.load_hf(tmp_path / "out").family == family
    found = native.load(tmp_path / "out") if kind == "moe_jax" else load(tmp_path / "out")
    one, other = (LayerWeights.of_model(m) for m in (load(tmp_path / "dense").model, found.model))
    assert_close(one, other)


def test_a_smaller_mixture_learns_from_its_folder_of_transformers(mixtral, tmp_path):
    (tmp_path / "text.jsonl").write_text(
        40 * (json.dumps({"text": "experts of a mixture" * 4}) + "\n")
    )
    settings = {
        "data.source": f"files:{tmp_path / 'text.jsonl'}",
        "data.data_dir": str(tmp_path / "data"),
        "data.seq_length": 32,
        "data.batch_size": 8,
        "training.teacher": str(mixtral),
        "training.steps": 2,
        "training.log_every": 1,
        "training.loss_chunk": 0,
    }
    with pytest.raises(ConfigError, match="has no tokenizer: copy its tokenizer.json"):
        mj.train(f"from_hf:{mixtral}", tmp_path / "none", settings)
    add_tokenizer(mixtral)
    prune(mixtral, tmp_path / "small", experts=3, file=tmp_path / "text.jsonl")
    trained = mj.train(f"from_hf:{tmp_path / 'small'}", tmp_path / "run", settings)
    lines = [line for line in trained.metrics if line["kind"] == "train"]
    assert len(lines) == 2 and all(line["distillation_loss"] > 0 for line in lines)
    uneven = settings | {"training.routing_weight": 1.0}
    with pytest.raises(ConfigError, match="list the group of each expert of the teacher"):
        mj.train(f"from_hf:{tmp_path / 'small'}", tmp_path / "other", uneven)


def test_a_llama_without_biases_becomes_a_mixtral(tmp_path):
    (tmp_path / "biased").mkdir()
    recorded("llama", tmp_path / "biased")
    model = load(tmp_path / "biased").config
    plain = dataclasses.replace(model.attention, qkv_bias=False, output_bias=False)
    model = dataclasses.replace(model, attention=plain)
    save(models.make(model, 16, jax.random.key(0)), tmp_path / "dense", "llama")
    changed = upcycle(tmp_path / "dense", tmp_path / "out", experts=4, k=2)
    assert (changed.kind, changed.difference) == ("hf", "")
    assert mj.load_hf(tmp_path / "out").family == "mixtral"
    assert_close(*(LayerWeights.of_model(load(tmp_path / n).model) for n in ("dense", "out")))
