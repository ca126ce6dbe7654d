"""Folders that are cut off or hold something else: one clear line each."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface import load
from tests.parity.compare_models import recorded

NORM = "model.norm.weight"


@pytest.fixture
def folder(tmp_path):
    recorded("mixtral", tmp_path)
    return tmp_path


def refused(folder, match):
    with pytest.raises(ConfigError, match=match) as error:
        load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[1, 2]", r"config.json is \[1, 2\], but it must be an object"),
        ('"mixtral"', "config.json is 'mixtral', but it must be an object"),
        ("3", "config.json is 3, but it must be an object"),
        ("null", "config.json is null, but it must be an object"),
        ("{", "config.json is not JSON"),
        ("", "config.json is not JSON"),
        ("[" * 100_000, "config.json is not JSON"),
        ("{}", "model_type='' is unknown"),
        ('{"model_type": ["mixtral"]}', "model_type in config.json is .'mixtral'., but it must"),
        ('{"model_type": null}', "model_type in config.json is null, but it must be a string"),
    ],
)
def test_a_configuration_that_is_no_object_is_refused(folder, text, match):
    (folder / "config.json").write_text(text)
    refused(folder, match)


def test_a_configuration_in_another_encoding_is_refused(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe{\x00}\x00")
    refused(folder, "config.json is not JSON")
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    refused(folder, "config.json cannot be read")


@pytest.mark.parametrize(
    ("quantized", "match"),
    [
        ("fp8", "quantization_config in config.json is 'fp8', but it must be an object"),
        ({"quant_method": "gptq"}, "says quant_method='gptq', but only 'fp8' or"),
        ({"weight_block_size": 128}, "weight_block_size=128, but it must be two numbers"),
        ({"weight_block_size": [0, 1]}, "a side is at least 1"),
        ({"weight_block_size": ["a", 1]}, "must be a whole number"),
    ],
)
def test_weights_that_are_packed_otherwise_are_refused(folder, quantized, match):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantized}))
    refused(folder, match)


@pytest.mark.parametrize(
    "index", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}']
)
def test_an_index_that_is_none_is_refused(folder, index):
    (folder / "model.safetensors.index.json").write_text(index)
    refused(folder, "index.json (is not JSON|has no weight_map)")


def indexed(folder):
    """The model in two files, with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-{int(name == NORM) + 1}.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    return folder / "model-2.safetensors"


def test_a_shard_that_is_missing_cut_off_or_lacks_a_tensor_is_refused(folder):
    shard = indexed(folder)
    load(folder)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8])
    refused(folder, "model-2.safetensors is not a safetensors file")
    save_file({"another": np.zeros(2, np.float32)}, shard)
    refused(folder, f"model-2.safetensors has no tensor {NORM} that can be read")
    shard.unlink()
    refused(folder, "lacks model-2.safetensors, which its index names")


@pytest.mark.parametrize(
    ("tensor", "match"),
    [
        (np.ones(24, np.int32), f"{NORM} in .* has dtype int32, but weights must be"),
        (np.ones(24, bool), "has dtype bool"),
        (np.ones((), np.float32), f"{NORM} has shape \\(\\), but config.json describes"),
        (np.ones((3, 5), np.float32), f"{NORM} has shape \\(3, 5\\)"),
    ],
)
def test_a_tensor_of_another_dtype_or_shape_is_refused(folder, tensor, match):
    tensors = load_file(folder / "model.safetensors") | {NORM: tensor}
    save_file(tensors, folder / "model.safetensors")
    refused(folder, match)
