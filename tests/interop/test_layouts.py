"""Files of one model that older and newer ``transformers`` name and join in their own ways."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface import load
from tests.parity.compare_models import recorded


def folder_of(case, folder):
    recorded(case, folder)
    return load_file(folder / "model.safetensors")


def assert_loads_the_same(folder, tensors):
    wanted = load(folder).model
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    found = load(folder).model
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def joined(tensors, block, gate, up, down):
    """Experts of every layer as transformers 5 has them in memory: (E, 2 F, M) and (E, M, F)."""
    found = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    layers = {name.split(f".{block}.experts.")[0] for name in tensors if ".experts." in name}
    for layer in layers:
        name = f"{layer}.{block}.experts"
        number = sum(n.startswith(f"{name}.") and n.endswith(f".{up}.weight") for n in tensors)
        each = [
            {part: tensors[f"{name}.{e}.{part}.weight"] for part in (gate, up, down)}
            for e in range(number)
        ]
        both = [np.concatenate([expert[gate], expert[up]]) for expert in each]
        found[f"{name}.gate_up_proj"] = np.stack(both)
        found[f"{name}.down_proj"] = np.stack([expert[down] for expert in each])
    return found


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ("mixtral", ("block_sparse_moe", "w1", "w3", "w2")),
        ("qwen2_moe_dense_first", ("mlp", "gate_proj", "up_proj", "down_proj")),
        ("deepseek_v3", ("mlp", "gate_proj", "up_proj", "down_proj")),
    ],
)
def test_experts_in_one_tensor_are_those_that_are_stored_one_by_one(case, parts, tmp_path):
    tensors = folder_of(case, tmp_path)
    fused = joined(tensors, *parts)
    assert len(fused) < len(tensors)
    assert_loads_the_same(tmp_path, fused)


def test_mixtral_as_transformers_5_has_it_in_memory(tmp_path):
    tensors = joined(folder_of("mixtral", tmp_path), "block_sparse_moe", "w1", "w3", "w2")
    tensors = {n.replace("block_sparse_moe", "mlp"): t for n, t in tensors.items()}
    assert "model.layers.0.mlp.experts.gate_up_proj" in tensors
    assert_loads_the_same(tmp_path, tensors)


def test_a_bare_model_has_no_prefix(tmp_path):
    # MixtralModel.save_pretrained: no head, which a tied model does not need.
    tensors = folder_of("mixtral_odd", tmp_path)
    assert_loads_the_same(tmp_path, {n.removeprefix("model."): t for n, t in tensors.items()})


@pytest.mark.parametrize(
    ("case", "embedding"),
    [
        ("mixtral_odd", "model.embed_tokens.weight"),
        ("switch_transformers", "shared.weight"),
        ("nllb_moe", "model.shared.weight"),
    ],
)
def test_a_tied_head_may_be_stored_too_or_instead_and_must_be_the_embedding(
    case, embedding, tmp_path
):
    tensors = {n: t for n, t in folder_of(case, tmp_path).items() if "embed_tokens" not in n}
    tensors |= {embedding: load_file(tmp_path / "model.safetensors")[embedding]}
    tensors.pop("lm_head.weight", None)
    table = tensors[embedding]
    assert_loads_the_same(tmp_path, tensors | {"lm_head.weight": table})
    other = {name: tensor for name, tensor in tensors.items() if name != embedding}
    assert_loads_the_same(tmp_path, other | {"lm_head.weight": table})
    save_file(tensors | {"lm_head.weight": table + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="lm_head.weight is stored and differs from") as error:
        load(tmp_path)
    assert "set tie_word_embeddings to false" in str(error.value)


def test_a_copy_of_the_embedding_in_each_stack_must_be_equal(tmp_path):
    tensors = folder_of("switch_transformers", tmp_path)
    table = tensors["shared.weight"]
    copy = "decoder.embed_tokens.weight"
    assert_loads_the_same(tmp_path, tensors | {copy: table})
    save_file(tensors | {copy: table * 2}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=f"{copy} is stored and differs"):
        load(tmp_path)


def test_two_names_of_one_tensor_are_refused(tmp_path):
    tensors = folder_of("mixtral", tmp_path)
    name = "model.layers.0.block_sparse_moe.gate.weight"
    twice = tensors | {name.replace("block_sparse_moe", "mlp"): tensors[name]}
    save_file(twice, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="are two names of one tensor: keep one"):
        load(tmp_path)


def test_the_text_model_is_read_from_within_and_must_be_there(tmp_path):
    recorded("llama4_scout", tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    wanted = load(tmp_path).config
    for outer in ({"text_config": text}, {"text_config": text, "tie_word_embeddings": False}):
        outer |= {"model_type": "llama4", "boi_token_index": 5}
        (tmp_path / "config.json").write_text(json.dumps(outer))
        assert load(tmp_path).config == wanted
    for odd, message in (
        ({}, "config.json lacks text_config, which must be an object"),
        ({"text_config": 3}, "text_config in config.json is 3, but it must be an object"),
        ({"text_config": text | {"hiddn_size": 3}}, "text_config in config.json has the key"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama4"} | odd))
        with pytest.raises(ConfigError, match=message):
            load(tmp_path)
