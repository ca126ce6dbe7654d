"""Weights in few bits: by hand, in whole models, and refused where scales do not fit."""

import json

import numpy as np
import pytest
from ml_dtypes import float8_e4m3fn
from safetensors.numpy import load_file, save_file

from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface import load, save
from moe_jax.interop.huggingface.packed import from_fp8, from_mxfp4
from tests.parity.compare_models import recorded


def write_raw(path, tensors):
    """Writes a safetensors file with eight-bit floats, which numpy's writer does not know."""
    names = {"float32": "F32", "float8_e4m3fn": "F8_E4M3", "uint8": "U8"}
    header, place = {}, 0
    for name, tensor in tensors.items():
        offsets = [place, place + tensor.nbytes]
        header[name] = {
            "dtype": names[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        place += tensor.nbytes
    text = json.dumps(header).encode()
    data = b"".join(np.ascontiguousarray(tensor).tobytes() for tensor in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_float8_by_hand():
    # Tiles of 2 x 3: rows 0-1 and 2, columns 0-2 and 3.
    weight = np.array([[1, 2, 4, 8], [1, 1, 1, 1], [0.5, -2, 0, 448]]).astype(float8_e4m3fn)
    scale = np.array([[1.0, 10.0], [100.0, 0.5]], np.float32)
    expected = [[1, 2, 4, 80], [1, 1, 1, 10], [50, -200, 0, 224]]
    np.testing.assert_array_equal(from_fp8(weight, scale, (2, 3)), expected)
    with pytest.raises(ValueError, match=r"needs scales \(2, 2\), or .*, found \(2, 1\)"):
        from_fp8(weight, scale[:, :1], (2, 3))


def test_float8_with_a_scale_for_each_matrix_by_hand():
    weight = np.array([[[1, 2], [4, 8]], [[1, 1], [0.5, -2]]]).astype(float8_e4m3fn)
    scale = np.array([10.0, 0.5], np.float32)
    expected = [[[10, 20], [40, 80]], [[0.5, 0.5], [0.25, -1]]]
    for shape in ((2,), (2, 1, 1)):
        np.testing.assert_array_equal(from_fp8(weight, scale.reshape(shape)), expected)
    for shape in ((), (1,)):
        found = from_fp8(weight[0], np.full(shape, 3.0, np.float32))
        np.testing.assert_array_equal(found, [[3, 6], [12, 24]])


def test_mxfp4_by_hand():
    # One expert, one output, one block: 0x71 is 0.5 and then 6; 0xA9 is -0.5 and then -1.
    blocks = np.zeros((1, 1, 1, 16), np.uint8)
    blocks[0, 0, 0, :2] = 0x71, 0xA9
    scales = np.array([[[129]]], np.uint8)  # four times
    found = from_mxfp4(blocks, scales)
    assert found.shape == (1, 32, 1)
    assert found[0, :4, 0].tolist() == [2.0, 24.0, -2.0, -4.0]
    assert not found[0, 4:].any()


def test_a_model_in_float8(tmp_path):
    # As the hub's DeepSeek-V3: matrices of attention and experts packed, the rest as it is.
    recorded("deepseek_v3", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors, packed, expected = load_file(path), {}, {}
    rng = np.random.default_rng(0)
    for name, tensor in tensors.items():
        if ".mlp.experts." not in name and not name.endswith("_proj.weight"):
            packed[name] = expected[name] = tensor
            continue
        shape = [-(-size // 8) for size in tensor.shape]
        scale = rng.uniform(0.01, 0.1, shape).astype(np.float32)
        packed[name] = (tensor / 0.05).astype(float8_e4m3fn)
        packed[f"{name}_scale_inv"] = scale
        expected[name] = from_fp8(packed[name], scale, (8, 8))
    write_raw(path, packed)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    imported = load(tmp_path)
    save(imported.model, tmp_path / "back", imported.family, original=imported.original)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "quantization_config" not in written
    config["quantization_config"]["weight_block_size"] = [4, 4]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"in tiles of 4 x 4 needs scales .* found"):
        load(tmp_path)


def test_mistral_small_4_as_released(tmp_path):
    # The release is a file with a vision tower; each matrix has one scale, and each linear layer
    # the scale of its activations, which only integer products of activations need.
    recorded("mistral4", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors, packed, expected = load_file(path), {}, {}
    experts = {name for name in tensors if ".mlp.experts." in name}
    assert experts and all(tensors[name].ndim == 3 for name in experts)
    for name, tensor in tensors.items():
        stored = "language_model." + name
        if name not in experts and not name.endswith("_proj.weight"):
            packed[stored] = expected[name] = tensor
            continue
        scale = np.linspace(0.01, 0.02, tensor.shape[0] if name in experts else 1)
        scale = scale.astype(np.float32).reshape((-1, 1, 1) if name in experts else ())
        packed[stored] = (tensor / 0.05).astype(float8_e4m3fn)
        packed[f"{stored}_scale_inv"] = scale
        stem = stored.removesuffix("weight") if stored.endswith("weight") else stored + "_"
        packed[f"{stem}activation_scale"] = np.ones(scale.shape[:1], np.float32)
        expected[name] = packed[stored].astype(np.float32) * scale
    packed["vision_tower.ln_pre.weight"] = np.ones(3, np.float32)
    packed["multi_modal_projector.norm.weight"] = np.ones(3, np.float32)
    write_raw(path, packed)
    text = json.loads((tmp_path / "config.json").read_text())
    packing = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}
    config = {"model_type": "mistral3", "text_config": text, "vision_config": {}}
    config |= {"tie_word_embeddings": False, "image_token_index": 10, "spatial_merge_size": 2}
    config |= {"quantization_config": packing}
    (tmp_path / "config.json").write_text(json.dumps(config))
    imported = load(tmp_path)
    assert imported.family == "mistral4"
    save(imported.model, tmp_path / "back", imported.family, original=imported.original)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)
    text["model_type"] = "mistral"
    (tmp_path / "config.json").write_text(json.dumps(config | {"text_config": text}))
    with pytest.raises(ConfigError, match="text_config in config.json has model_type='mistral'"):
        load(tmp_path)


def test_experts_in_mxfp4(tmp_path):
    recorded("gpt_oss", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    rng = np.random.default_rng(0)
    config = json.loads((tmp_path / "config.json").read_text())
    # Blocks are of 32 inputs: the model's 24 and the experts' 20 become 32.
    assert (config["hidden_size"], config["intermediate_size"]) == (24, 20)
    config |= {"hidden_size": 32, "intermediate_size": 32}
    wider = {24: 32, 20: 32, 40: 64}
    packed, expected = {}, {}
    for name, tensor in tensors.items():
        shape = [wider.get(size, size) for size in tensor.shape]
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = shape
            blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8)
            scales = rng.integers(120, 128, (experts, outputs, inputs // 32), np.uint8)
            packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            expected[name] = from_mxfp4(blocks, scales)
        else:
            packed[name] = expected[name] = rng.normal(size=shape).astype(np.float32)
    save_file(packed, path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    imported = load(tmp_path)
    save(imported.model, tmp_path / "back", imported.family)
    back = load_file(tmp_path / "back" / "model.safetensors")
    for name, tensor in expected.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


def test_transformers_unpacks_the_same():
    torch = pytest.importorskip("torch", reason="torch is not installed: run `make parity`")
    integration = pytest.importorskip("transformers.integrations.mxfp4")
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (2, 6, 3, 16), np.uint8)
    scales = rng.integers(100, 140, (2, 6, 3), np.uint8)
    theirs = integration.convert_moe_packed_tensors(
        torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32
    )
    np.testing.assert_array_equal(from_mxfp4(blocks, scales), theirs.numpy())
