"""What an export says and keeps: config.json, dtypes, shards, and a line where it cannot be."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from moe_jax import models, routing
from moe_jax.errors import ConfigError
from moe_jax.interop import folders, native
from moe_jax.interop.huggingface import FAMILIES, load, save
from moe_jax.interop.huggingface.description import description, families_of
from moe_jax.nn.latent import Latent
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.positions import NoPositions
from tests.parity.compare_models import recorded

PLAIN = models.DecoderConfig(num_layers=2)


def loaded(case, folder):
    folder.mkdir(exist_ok=True)
    recorded(case, folder)
    return load(folder)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return loaded("mixtral", tmp_path_factory.mktemp("mixtral"))


def said(imported, original):
    return description(FAMILIES[imported.family], imported.config, 43, "bfloat16", original)


def test_an_older_spelling_is_not_kept_beside_the_newer_one(mixtral):
    older = {"torch_dtype": "float16", "rope_scaling": {"rope_type": "yarn"}, "rope_theta": 5.0}
    written = said(mixtral, older | {"auto_map": {}, "quantization_config": {}, "id2label": {}})
    assert not written.keys() & {*older, "auto_map", "quantization_config", "id2label"}
    assert written["dtype"] == "bfloat16"
    assert written["rope_parameters"]["rope_theta"] == mixtral.config.positions.base


def test_tokens_and_lengths_carry_over_and_the_model_wins(mixtral):
    kept = {"eos_token_id": [2, 7], "pad_token_id": 5, "max_position_embeddings": 99}
    written = said(mixtral, kept | {"initializer_range": 0.3, "hidden_size": 999})
    assert kept.items() <= written.items() and written["initializer_range"] == 0.3
    assert written["hidden_size"] == mixtral.config.width


def test_a_text_model_inside_another_is_written_alone(tmp_path):
    imported = loaded("llama4_scout", tmp_path / "a")
    outer = {"text_config": {"eos_token_id": 9}, "vision_config": {}, "boi_token_index": 5}
    written = said(imported, outer | {"pad_token_id": 3})
    assert (written["eos_token_id"], written["pad_token_id"]) == (9, 3)
    assert not written.keys() & {"text_config", "vision_config", "boi_token_index"}


def test_states_of_routers_are_float32_in_every_export(tmp_path):
    # A level of 4.5 with differences of 0.01: bfloat16 has steps of 0.03 there.
    imported = loaded("deepseek_v3", tmp_path / "a")
    router = imported.model.layers.parts[-1][0].feed_forward.router
    (name,) = router.state
    bias = router.state[name]
    bias[...] = jnp.asarray(4.5 + 0.01 * np.arange(bias[...].size).reshape(bias[...].shape))
    save(imported.model, tmp_path / "b", "deepseek_v3", dtype="bfloat16")
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    exact = {name for name, tensor in tensors.items() if tensor.dtype == np.float32}
    ends = ("e_score_correction_bias", ".mlp.gate.weight")
    assert exact == {name for name in tensors if name.endswith(ends)} and len(exact) == 2
    found = next(tensor for name, tensor in tensors.items() if name.endswith(ends[0]))
    np.testing.assert_array_equal(found, np.asarray(bias[...]).reshape(-1))


def test_no_shard_of_an_older_export_stays(mixtral, tmp_path):
    save(mixtral.model, tmp_path, "mixtral", shard_bytes=20_000)
    assert (tmp_path / "model.safetensors.index.json").exists()
    (tmp_path / "notes.txt").write_text("mine")
    save(mixtral.model, tmp_path, "mixtral")
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "notes.txt",
    }


def test_a_save_that_fails_leaves_the_older_export(mixtral, tmp_path, monkeypatch):
    save(mixtral.model, tmp_path / "out", "mixtral")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("moe_jax.interop.huggingface.files.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save(mixtral.model, tmp_path / "out", "mixtral", shard_bytes=20_000)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_dtype_that_cannot_be_written_is_refused(mixtral, tmp_path):
    with pytest.raises(ConfigError, match="dtype='float8' is not one of float32, bfloat16"):
        save(mixtral.model, tmp_path / "out", "mixtral", dtype="float8")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_that_cannot_say_a_model_names_the_setting(family):
    with pytest.raises(ConfigError, match=f"{family} cannot express ") as error:
        description(FAMILIES[family], PLAIN, 43, "float32")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("family", "config", "setting"),
    [
        ("mixtral", models.DecoderConfig(positions=NoPositions()), "model.positions=NoPositions"),
        ("qwen3_moe", models.DecoderConfig(attention=Latent()), "model.attention=Latent"),
        (
            "olmoe",
            models.DecoderConfig(moe=MoEConfig(router=routing.preset("fairseq_top2"))),
            "model.moe.router.select=Top2",
        ),
        ("deepseek_v3", PLAIN, "model.attention=Details"),
        ("mixtral", models.EncoderDecoderConfig(), "this EncoderDecoderConfig"),
        ("switch_transformers", PLAIN, "this DecoderConfig"),
    ],
)
def test_a_part_of_another_type_is_rejected_by_its_setting(family, config, setting):
    with pytest.raises(ConfigError, match=f"{family} cannot express {setting}$"):
        description(FAMILIES[family], config, 43, "float32")


def test_no_family_can_say_a_latent_space_of_experts(mixtral):
    moe = dataclasses.replace(mixtral.config.moe, latent_dim=8)
    config = dataclasses.replace(mixtral.config, moe=moe)
    with pytest.raises(ConfigError, match="^mixtral cannot express layers.0.moe.latent_dim=8; "):
        description(FAMILIES["mixtral"], config, 43, "float32")


def test_families_that_can_say_a_model_are_found(mixtral):
    assert "mixtral" in families_of(FAMILIES, mixtral.config)
    assert families_of(FAMILIES, PLAIN) == []


def test_kinds_of_folders_are_told_apart(mixtral, tmp_path):
    assert folders.kind_of(tmp_path / "nowhere") == "none"
    save(mixtral.model, tmp_path / "hf", "mixtral")
    native.save(mixtral, tmp_path / "native")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"config": {}}')
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text("{")
    found = {path.name: folders.kind_of(path) for path in tmp_path.iterdir()}
    assert found == {"hf": "hf", "native": "moe_jax", "run": "run", "odd": "none"}
    assert folders.describe(tmp_path / "hf").config == folders.describe(tmp_path / "native").config


DAMAGES = {
    "half converted": lambda path: (path / "parameters").rename(path / "gone"),
    "model.json is damaged": lambda path: (path / "model.json").write_text("{"),
    "lacks kind": lambda path: (path / "model.json").write_text('{"config": 1}'),
    "model.json is missing": lambda path: (path / "model.json").unlink(),
    "does not hold the parameters": lambda path: edit(path, vocab_size=44),
    "has kind='Other'": lambda path: edit(path, kind="Other"),
}


def edit(path, **changes):
    found = json.loads((path / "model.json").read_text()) | changes
    (path / "model.json").write_text(json.dumps(found))


@pytest.mark.parametrize("match", DAMAGES)
def test_a_converted_folder_that_is_not_whole_is_one_line(mixtral, tmp_path, match):
    native.save(mixtral, tmp_path / "native")
    DAMAGES[match](tmp_path / "native")
    with pytest.raises(ConfigError, match=match) as error:
        native.load(tmp_path / "native")
    assert "\n" not in str(error.value)


def test_a_tokenizer_travels_through_our_own_format(mixtral, tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE"):
        (tmp_path / "a" / name).write_text(name)
    native.save(mixtral, tmp_path / "b", tmp_path / "a")
    save(mixtral.model, tmp_path / "c", "mixtral", companions=folders.companions_of(tmp_path / "b"))
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE"):
        assert (tmp_path / "c" / name).read_text() == name
    assert folders.tokenizer_of(tmp_path / "b") == f"hf:{tmp_path / 'b' / 'released'}"


def test_a_switch_without_experts_is_read_without_experts(tmp_path):
    model = loaded("switch_transformers", tmp_path).config
    family, none = FAMILIES["switch_transformers"], MoEConfig(every=0)
    dense = dataclasses.replace(model, encoder_moe=none, decoder_moe=none)
    assert model.sparse_layers()
    assert not family.read(description(family, dense, 1, "float32")).sparse_layers()

    def without_step(config):
        written = family.write(config).items()
        return {name: value for name, value in written if not name.endswith("sparse_step")}

    # A reader would give the second layer of each stack experts, of which the model has none.
    other = dataclasses.replace(family, write=without_step)
    with pytest.raises(ConfigError, match="cannot express"):
        description(other, dense, 1, "float32")
