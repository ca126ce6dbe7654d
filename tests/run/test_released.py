"""A run that starts from a released model, and a run that is exported as one."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from moe_jax.configs import from_hf
from safetensors.numpy import load_file, save_file

from moe_jax import data
from moe_jax.config.experiment import Experiment, TrainingConfig
from moe_jax.config.schema import build
from moe_jax.errors import ConfigError
from moe_jax.interop import native
from moe_jax.interop.huggingface import load, save
from moe_jax.models import DecoderConfig
from moe_jax.run import workdir
from moe_jax.run.exported import open_trained, tokenizer_texts
from moe_jax.run.predecessors import open_sources
from moe_jax.run.released import adopted, remembered
from moe_jax.run.session import open_checkpoints, open_session
from moe_jax.training.state import named_leaves
from tests.parity.compare_models import recorded

DATA = data.DataConfig("mixture", tokenizer="bytes", seq_length=16, batch_size=16)
OWN = DecoderConfig(num_layers=2, width=16, num_heads=2, head_dim=8, mlp_dim=32)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral")
    recorded("mixtral", folder)
    (folder / "LICENSE").write_text("free")
    return folder


@pytest.fixture(scope="module")
def converted(released, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "native"
    native.save(load(released, dtype="bfloat16"), folder, released)
    return folder


def starting(folder, model=OWN, **training):
    training = TrainingConfig(steps=2, start_from=str(folder), **training)
    return Experiment("new", model, DATA, training=training)


def first_state(experiment, folder):
    sources = open_sources(experiment, folder)
    tokenizer = sources.tokenizer or data.open_tokenizer(experiment.data)
    tokenizer = data.with_spare_ids(tokenizer, sources.rows)
    session = sources.joined(open_session(experiment, tokenizer))
    return session, session.first_state()


def test_the_model_is_the_folder_s_and_how_it_runs_is_the_config_s(released, tmp_path):
    own = dataclasses.replace(OWN, dropout=0.1, remat="full", scan_layers=False)
    found = adopted(starting(released, own), tmp_path)
    model = load(released).config
    kept = {"dropout": 0.1, "remat": "full", "scan_layers": False}
    assert found.model == dataclasses.replace(model, **kept)
    assert (found.data, found.training.start_from) == (DATA, str(released))
    # A run of ours keeps its configuration, and so does one that takes only shared weights.
    for same in (starting(""), starting(tmp_path), starting(released, start_with="shared")):
        assert adopted(same, tmp_path) == same


def test_a_config_of_the_same_function_keeps_its_training(released, tmp_path):
    model = load(released).config
    moe = dataclasses.replace(model.moe, group_size=64, expert_dropout=0.4)
    mine = starting(released, dataclasses.replace(model, moe=moe))
    assert adopted(mine, tmp_path) == mine


def test_the_command_line_holds_or_is_refused(released, tmp_path):
    experiment = starting(released)
    found = adopted(experiment, tmp_path, {"model.moe.group_size": 64, "model.dropout": 0.2})
    assert (found.model.moe.group_size, found.model.dropout) == (64, 0.2)
    with pytest.raises(ConfigError, match="of another model: .*num_experts=5 there and 8 here"):
        adopted(experiment, tmp_path, {"model.moe.num_experts": 8})
    with pytest.raises(ConfigError, match="model.moe.router.k is not a setting"):
        adopted(experiment, tmp_path, {"model.moe.router.k": 1})


def test_once_begun_the_workdir_says_what_the_model_is(released, tmp_path):
    experiment = adopted(starting(released), tmp_path)
    workdir.claim(tmp_path, experiment)
    open_sources(experiment, tmp_path).keep(tmp_path)
    gone = starting(tmp_path / "gone")
    assert adopted(gone, tmp_path).model == experiment.model
    assert remembered(tmp_path)["family"] == "mixtral"
    assert (tmp_path / "released" / "LICENSE").read_text() == "free"


@pytest.mark.parametrize("kind", ["released", "converted"])
def test_weights_are_those_of_the_folder_in_the_type_of_the_run(
    released, converted, tmp_path, kind
):
    folder = {"released": released, "converted": converted}[kind]
    own = dataclasses.replace(OWN, scan_layers=False)
    session, state = first_state(adopted(starting(folder, own), tmp_path), tmp_path)
    leaves = named_leaves(state)
    assert {leaves[name].dtype for name in leaves if name.startswith("params")} == {
        np.dtype("float32")
    }
    tensors = load_file(released / "model.safetensors")
    kernel = leaves["params/layers/parts/1/0/feed_forward/router/kernel"]
    theirs = tensors["model.layers.1.block_sparse_moe.gate.weight"].T
    if kind == "converted":
        theirs = theirs.astype(jax.numpy.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(kernel, theirs)
    # Bytes are 259 ids and the folder has rows for 43: the others are drawn.
    table, drawn = leaves["params/embedding/table"], named_leaves(session.recipe.create()[1])
    assert session.tokenizer.vocab_size == 259 and table.shape == (259, 24)
    np.testing.assert_array_equal(table[43:], drawn["params/embedding/table"][43:])
    assert np.any(table[:43] != drawn["params/embedding/table"][:43])


def test_rows_without_a_token_stay(released, tmp_path):
    # 43 rows, and a tokenizer of fewer ids: bytes alone are 259, so the folder has 300 here.
    folder = tmp_path / "wide"
    model = load(released).model
    wide = {
        name: np.pad(tensor, [(0, 257), (0, 0)]) if tensor.shape == (43, 24) else tensor
        for name, tensor in load_file(released / "model.safetensors").items()
    }
    save(model, folder, "mixtral")
    save_file(wide, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 300}
    (folder / "config.json").write_text(json.dumps(config))
    session, state = first_state(adopted(starting(folder), tmp_path / "run"), tmp_path / "run")
    assert session.tokenizer.vocab_size == 300
    table = named_leaves(state)["params/embedding/table"]
    np.testing.assert_array_equal(table, wide["model.embed_tokens.weight"])


def test_shared_weights_alone_start_another_model(released, tmp_path):
    model = load(released).config
    dense = dataclasses.replace(model, moe=dataclasses.replace(model.moe, every=0))
    _, state = first_state(starting(released, dense, start_with="shared"), tmp_path)
    query = named_leaves(state)["params/layers/parts/0/0/attention/query"][1]
    theirs = load_file(released / "model.safetensors")["model.layers.1.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(query.reshape(24, -1), theirs.T)
    other = dataclasses.replace(OWN, width=32)
    with pytest.raises(ConfigError, match="shares no weights with this model"):
        open_sources(starting(released, other, start_with="shared"), tmp_path / "other")


def test_identities_follow_the_weights_and_not_the_folder(released, tmp_path):
    experiment = adopted(starting(released), tmp_path)
    copy = shutil.copytree(released, tmp_path / "copy")
    moved = adopted(starting(copy), tmp_path)
    one, two = (open_sources(e, tmp_path).identities for e in (experiment, moved))
    assert one == two
    blob = bytearray((copy / "model.safetensors").read_bytes())
    blob[-1] ^= 1
    (copy / "model.safetensors").write_bytes(blob)
    assert open_sources(moved, tmp_path).identities != one


def test_folders_that_hold_nothing_to_start_from_are_one_line(released, tmp_path):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text((released / "config.json").read_text())
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"name": "other"}')
    cases = {"half": "has neither model.safetensors nor", "foreign": "model_type='' is unknown"}
    for name, match in cases.items():
        with pytest.raises(ConfigError, match=match) as error:
            adopted(starting(tmp_path / name), tmp_path / "run")
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="holds no run"):
        open_sources(starting(tmp_path / "nowhere"), tmp_path / "run")
    with pytest.raises(ConfigError, match="config.json was not written by a run"):
        workdir.load(released)


def written(folder, experiment, state, tokenizer, source=None):
    """A workdir with one checkpoint and no result, as an unfinished run leaves it."""
    workdir.claim(folder, experiment)
    tokenizer.save(folder)
    if source:
        open_sources(experiment, folder).keep(folder)
    with open_checkpoints(experiment, folder / workdir.CHECKPOINTS) as checkpoints:
        checkpoints.save(1, named_leaves(state), {})


def test_an_unfinished_run_is_exported_as_the_family_it_started_from(released, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    experiment = adopted(starting(released), run)
    session, state = first_state(experiment, run)
    written(run, experiment, state, session.tokenizer, released)
    imported = open_trained(run)
    assert (imported.family, imported.vocab_size) == ("mixtral", 259)
    save(imported.model, out, imported.family, original=imported.original)
    before, after = (load_file(path / "model.safetensors") for path in (released, out))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name][: len(tensor)], tensor, err_msg=name)
    said = json.loads((out / "config.json").read_text())
    assert (said["vocab_size"], said["bos_token_id"], said["eos_token_id"]) == (259, 1, 2)
    assert tokenizer_texts(released) == {}


def test_a_run_of_our_own_asks_for_a_family(released, tmp_path):
    model = load(released).config
    for name, config in (("can", model), ("cannot", OWN)):
        experiment = Experiment(name, config, DATA, training=TrainingConfig(steps=2))
        session = open_session(experiment, data.Bytes())
        written(tmp_path / name, experiment, session.recipe.create()[1], data.Bytes())
    with pytest.raises(ConfigError, match="did not start from a released model: add --family="):
        open_trained(tmp_path / "can")
    imported = open_trained(tmp_path / "can", "mixtral")
    assert imported.original["eos_token_id"] == data.Bytes.eos_id
    # transformers needs a tokenizer.json, which a run of our own writes from its tokenizer.
    assert "tokenizer.json" in tokenizer_texts(tmp_path / "can")
    with pytest.raises(ConfigError, match="no family can express its model"):
        open_trained(tmp_path / "cannot")
    with pytest.raises(ConfigError, match="mixtral cannot express "):
        open_trained(tmp_path / "cannot", "mixtral")


def test_a_run_without_a_checkpoint_cannot_be_exported(released, tmp_path):
    workdir.claim(tmp_path, adopted(starting(released), tmp_path))
    with pytest.raises(ConfigError, match="holds no checkpoint yet: train first"):
        open_trained(tmp_path)


@pytest.mark.parametrize("case", ["mixtral", "deepseek_v3", "switch_transformers", "nllb_moe"])
def test_the_config_of_a_folder_describes_its_model(case, tmp_path):
    recorded(case, tmp_path)
    experiment = build(Experiment, from_hf.get_config(str(tmp_path)))
    assert experiment.model == load(tmp_path).config
    assert experiment.training.start_from == str(tmp_path)
    assert adopted(experiment, tmp_path / "run") == experiment
    experiment.check(1)
