"""Text models of checkpoints with a vision tower, against ``transformers`` itself."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: run `make parity`")
transformers = pytest.importorskip("transformers", reason="run `make parity`")

from safetensors import safe_open  # noqa: E402

from moe_jax.errors import ConfigError  # noqa: E402
from moe_jax.interop.huggingface import load, save  # noqa: E402
from moe_jax.interop.huggingface.families import TOWERS  # noqa: E402
from tests.parity import compare_models as compare  # noqa: E402
from tests.parity import models  # noqa: E402
from tests.parity.weights import write  # noqa: E402

TEXT = {
    "vocab_size": 43,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 22,
    "moe_intermediate_size": 10,
    "max_position_embeddings": 64,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
VISION = {"depth": 1, "hidden_size": 8, "num_heads": 2, "intermediate_size": 8}
VISION |= {"out_hidden_size": 24, "patch_size": 2, "image_size": 8}
CASES = {
    "qwen3_vl_moe": (
        {"num_experts": 6, "num_experts_per_tok": 3, "mlp_only_layers": [1]},
        {"mrope_section": [2, 1, 1], "mrope_interleaved": True},
        {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    ),
    "glm4v_moe": (
        {"n_routed_experts": 8, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5}
        | {"num_experts_per_tok": 3},
        {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5},
        {},
    ),
    "gemma4": (
        {
            "rope_parameters": None,
            "global_head_dim": 12,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "enable_moe_block": True,
            "num_experts": 6,
            "top_k_experts": 3,
            "hidden_size_per_layer_input": 0,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 4,
            "final_logit_softcapping": 3.0,
            "use_bidirectional_attention": "vision",
        },
        {},
        {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
        | {"head_dim": 4, "position_embedding_size": 16, "pooling_kernel_size": 1},
    ),
    "mistral3": (
        {
            "model_type": "mistral4",
            "num_key_value_heads": 4,
            "head_dim": 10,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "first_k_dense_replace": 1,
            "q_lora_rank": 10,
            "kv_lora_rank": 12,
            "qk_nope_head_dim": 6,
            "qk_rope_head_dim": 4,
            "v_head_dim": 5,
        },
        {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.7}
        | {"original_max_position_embeddings": 4, "llama_4_scaling_beta": 0.3},
        {"model_type": "pixtral", "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"head_dim": 4, "num_channels": 3},
    ),
}
SPARSE = {"qwen3_vl_moe": 1, "glm4v_moe": 1, "gemma4": 2, "mistral3": 1}


@pytest.fixture(scope="module", params=CASES)
def tower(request, tmp_path_factory):
    folder, (text, rope, vision) = tmp_path_factory.mktemp(request.param), CASES[request.param]
    rope = {"rope_type": "default", "rope_theta": 1e4, **rope}
    config = transformers.AutoConfig.for_model(
        request.param,
        text_config=TEXT | {"rope_parameters": rope} | text,
        vision_config=VISION | vision,
    )
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "np") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in sorted(file.keys())}
    write(shapes, folder)
    return request.param, folder


def logits(folder, record):
    model = models.load(folder)
    ids, mask = torch.tensor(record["ids"]), torch.tensor(record["mask"])
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits.float().numpy()


def test_the_text_model_has_the_logits_of_transformers_and_is_exported(tower, tmp_path):
    ids = np.random.default_rng(0).integers(3, 43, (2, 11))
    record = {"ids": ids, "mask": np.ones_like(ids)}
    name, folder = tower
    wanted, imported = logits(folder, record), load(folder)
    found, experts, _ = compare.forward(imported, record)
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()
    assert len(experts) == SPARSE[name]
    save(imported.model, tmp_path, imported.family, original=imported.original)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] in ("qwen3_moe", "glm4_moe", "gemma4_text", "mistral4")
    again = logits(tmp_path, record)
    assert np.abs(again - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_a_key_of_a_tower_that_is_spelt_wrong_is_refused(tower, tmp_path):
    config = json.loads((tower[1] / "config.json").read_text())
    config["text_config"]["num_hiden_layers"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="text_config in config.json has the key 'num_hiden"):
        load(tmp_path)


@pytest.mark.parametrize("name", TOWERS)
def test_the_defaults_are_those_of_transformers(name):
    kind = transformers.models.auto.configuration_auto.CONFIG_MAPPING[name]
    keys, defaults = TOWERS[name].keys, kind().to_dict()
    known = {*keys.read, *keys.unread, *keys.aliases}
    assert {key for key in defaults if not key.startswith("_")} <= known
    for key in set(defaults) & set(keys.read) - {"rope_parameters", "head_dim", "mlp_only_layers"}:
        assert keys.read[key].default == defaults[key], key
