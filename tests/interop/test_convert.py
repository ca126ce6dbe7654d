"""Loading and saving: what is refused, and what is kept."""

import json
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from moe_jax.config.experiment import Experiment
from moe_jax.config.schema import build
from moe_jax.counting.published import load as load_config
from moe_jax.errors import ConfigError
from moe_jax.interop import native
from moe_jax.interop.huggingface import FAMILIES, load, save
from moe_jax.interop.huggingface.function import function_of
from moe_jax.parallel import MeshConfig, make_mesh
from tests.counting.test_published import MODELS
from tests.parity.compare_models import assert_same_function, recorded


@pytest.fixture
def mixtral(tmp_path):
    recorded("mixtral", tmp_path)
    return tmp_path


def edited(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder, match, **options):
    with pytest.raises(ConfigError, match=match) as error:
        load(folder, **options)
    assert "\n" not in str(error.value)


def test_missing_and_unknown_tensors_are_listed(mixtral):
    tensors = load_file(mixtral / "model.safetensors")
    tensors["model.layers.9.odd"] = tensors.pop("model.norm.weight")
    save_file(tensors, mixtral / "model.safetensors")
    refused(mixtral, r"lacks 1 tensor\(s\): model.norm.weight")
    tensors["model.norm.weight"] = tensors["model.layers.9.odd"]
    save_file(tensors, mixtral / "model.safetensors")
    refused(mixtral, r"has unknown 1 tensor\(s\): model.layers.9.odd")


def test_another_shape_is_refused(mixtral):
    edited(mixtral, intermediate_size=21)
    refused(mixtral, r"experts.0.w1.weight has shape \(20, 24\), but config.json describes")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "mixtrall"}, "did you mean 'mixtral'"),
        ({"model_type": "nemotron_h"}, "cannot be read: it has Mamba-2 layers; the config"),
        ({"hidden_act": "tanhh"}, "hidden_act='tanhh' is not one of silu"),
        ({"sliding_window": 0}, "sliding_window in config.json is 0, but it must be at least 1"),
        ({"rope_parameters": {"rope_type": "odd"}}, "rope_type='odd'; known: linear"),
    ],
)
def test_settings_that_are_not_supported_are_refused(mixtral, changes, match):
    edited(mixtral, **changes)
    refused(mixtral, match)


def test_folders_that_hold_no_model_are_refused(mixtral, tmp_path):
    refused(tmp_path / "nowhere", "does not exist")
    refused(mixtral, "dtype='int8' is not one of float32, bfloat16", dtype="int8")
    (mixtral / "model.safetensors").write_bytes(b"nonsense")
    refused(mixtral, "is not a safetensors file")
    (mixtral / "model.safetensors").unlink()
    refused(mixtral, "has neither model.safetensors nor")
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (mixtral / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(mixtral, "lacks model-1.safetensors, which its index names")


def test_a_family_that_cannot_say_the_model_is_refused(mixtral, tmp_path):
    model = load(mixtral).model
    with pytest.raises(ConfigError, match="qwen3_moe cannot express layers.0.attention"):
        save(model, tmp_path / "out", "qwen3_moe")
    assert not (tmp_path / "out").exists()


def test_experts_are_born_in_their_sharding(mixtral):
    edited(mixtral, num_local_experts=4)
    tensors = load_file(mixtral / "model.safetensors")
    for name in [n for n in tensors if ".experts.4." in n]:
        del tensors[name]
    for layer in range(2):
        name = f"model.layers.{layer}.block_sparse_moe.gate.weight"
        tensors[name] = np.ascontiguousarray(tensors[name][:4])
    save_file(tensors, mixtral / "model.safetensors")
    mesh = make_mesh(MeshConfig(data=2, expert=4))
    loaded = load(mixtral, mesh=mesh)
    up = loaded.model.layers.parts[0][0].feed_forward.experts.up[...]
    assert up.shape == (2, 4, 24, 20)
    assert up.addressable_shards[0].data.shape == (2, 1, 24, 20)
    np.testing.assert_array_equal(
        up[1, 3], tensors["model.layers.1.block_sparse_moe.experts.3.w3.weight"].T
    )


def test_bfloat16_parameters_and_activations(mixtral):
    loaded = load(mixtral, dtype="bfloat16", remat="full")
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.model)} == {jnp.dtype("bfloat16")}
    assert loaded.config.compute_dtype == "bfloat16" and loaded.config.remat == "full"


def test_our_own_format_keeps_everything(mixtral, tmp_path):
    loaded = load(mixtral)
    native.save(loaded, tmp_path / "ours")
    again = native.load(tmp_path / "ours")
    assert (again.config, again.vocab_size, again.family) == (loaded.config, 43, "mixtral")
    for mine, theirs in zip(
        jax.tree.leaves(again.model), jax.tree.leaves(loaded.model), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)
    with pytest.raises(ConfigError, match="holds no converted model"):
        native.load(tmp_path)


def test_a_converted_folder_with_the_old_leading_axes_is_read(mixtral, tmp_path):
    # Layers outside a scan were once saved behind an axis of length 1.
    loaded = load(mixtral, scan_layers=False)
    old = load(mixtral, scan_layers=False)
    for layer in old.model.layers.layers():
        nnx.update(layer.block, jax.tree.map(lambda x: x[None], nnx.state(layer.block)))
    native.save(old, tmp_path / "old")
    for mesh in (None, make_mesh(MeshConfig(data=4, model=2))):
        again = native.load(tmp_path / "old", mesh).model
        assert jax.tree.structure(again) == jax.tree.structure(loaded.model)
        jax.tree.map(np.testing.assert_array_equal, again, loaded.model)


def test_the_command_line_there_and_back(mixtral, tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    command = [sys.executable, "-m", "moe_jax.convert"]
    there = [*command, "--from=hf", f"--input={mixtral}", f"--output={ours}"]
    done = subprocess.run(there, capture_output=True, text=True, check=True)
    assert "tensors" in done.stderr and "mixtral" in done.stdout
    back = [*command, "--from=moe_jax", f"--input={ours}", f"--output={theirs}"]
    subprocess.run(back, capture_output=True, text=True, check=True)
    before, after = (load_file(path / "model.safetensors") for path in (mixtral, theirs))
    assert set(before) == set(after)
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor)
    again = subprocess.run(there, capture_output=True, text=True)
    assert again.returncode == 2 and again.stderr.startswith("error: ")
    assert "is not empty" in again.stderr


def published(name):
    experiment = build(Experiment, load_config(MODELS[name]).config)
    return experiment.model


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("mixtral_8x7b", "mixtral"),
        ("dbrx", "dbrx"),
        ("olmoe_1b_7b", "olmoe"),
        ("qwen1.5_moe_a2.7b", "qwen2_moe"),
        ("qwen3_30b_a3b", "qwen3_moe"),
        ("deepseek_v2_lite", "deepseek_v2"),
        ("deepseek_v3", "deepseek_v3"),
        ("gpt_oss_20b", "gpt_oss"),
        ("gpt_oss_120b", "gpt_oss"),
        ("llama4_scout", "llama4_text"),
        ("llama4_maverick", "llama4_text"),
        ("glm_4.5", "glm4_moe"),
        ("glm_4.5_air", "glm4_moe"),
        ("kimi_k2", "deepseek_v3"),
        ("minimax_m2", "minimax_m2"),
        ("ernie_4.5_21b_a3b", "ernie4_5_moe"),
        ("ernie_4.5_300b_a47b", "ernie4_5_moe"),
        ("dots_llm1", "dots1"),
        ("hunyuan_a13b", "hunyuan_v1_moe"),
        ("granite_3.0_1b_a400m", "granitemoe"),
        ("k_exaone_236b_a23b", "exaone_moe"),
        ("gemma_4_26b_a4b", "gemma4_text"),
        ("flex_olmo_37b", "flex_olmo"),
        ("trinity_nano", "afmoe"),
        ("trinity_mini", "afmoe"),
        ("trinity_large", "afmoe"),
        ("qwen3_vl_30b_a3b", "qwen3_moe"),
        ("glm_4.5v", "glm4_moe"),
        ("mistral_small_4", "mistral4"),
        ("switch_base_8", "switch_transformers"),
        ("nllb_moe_54b", "nllb-moe"),
    ],
)
def test_a_published_config_is_a_model_of_its_family(name, family):
    # Written as config.json and read again, it computes the same.
    config = published(name)
    again = FAMILIES[family].read(FAMILIES[family].write(config))
    assert function_of(again) == function_of(config)


def test_the_host_holds_one_tensor_at_a_time(tmp_path):
    settings = {"hidden_size": 256, "intermediate_size": 4096, "num_local_experts": 4}
    recorded("mixtral", tmp_path)
    edited(tmp_path, **settings, num_attention_heads=8, num_key_value_heads=8, head_dim=32)
    read = json.loads((tmp_path / "config.json").read_text())
    family = FAMILIES["mixtral"]
    expert, square = (4096, 256), (256, 256)
    shapes = {"lm_head": (43, 256), "embed_tokens": (43, 256), "gate": (4, 256), "norm": (256,)}
    shapes |= {"w1": expert, "w3": expert, "w2": expert[::-1], "proj": square}
    tensors = {
        entry.theirs: np.zeros(next(s for part, s in shapes.items() if part in entry.theirs))
        for entry in family.entries(family.read(read))
    }
    tensors = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    total, largest = (f(t.nbytes for t in tensors.values()) for f in (sum, max))
    del tensors
    tracemalloc.start()
    load(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # 4 MiB a tensor and 97 MiB in all; traces and compiled programs are a few MiB.
    assert largest < peak < 6 * largest < total / 4


def test_the_text_model_of_a_checkpoint_with_a_vision_tower(tmp_path):
    record = recorded("llama4_maverick", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    tensors["vision_model.patch.weight"] = np.zeros((2, 2), np.float32)
    tensors["multi_modal_projector.weight"] = np.zeros((2, 2), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    text = json.loads((tmp_path / "config.json").read_text())
    outer = {"model_type": "llama4", "text_config": text, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    assert_same_function(load(tmp_path), record)


def joined(tensors):
    """Returns the tensors of Qwen3-MoE as Qwen3-VL stores them: experts joined, inputs first."""
    found = {}
    for name, tensor in tensors.items():
        block, _, rest = name.partition(".experts.")
        if not rest:
            found[name] = tensor
        elif rest.startswith("0."):
            count = sum(n.startswith(f"{block}.experts.") for n in tensors) // 3
            every = [f"{block}.experts.{e}" for e in range(count)]
            gate, up, down = (
                np.stack([tensors[f"{expert}.{part}_proj.weight"] for expert in every]).swapaxes(
                    1, 2
                )
                for part in ("gate", "up", "down")
            )
            found[f"{block}.experts.gate_up_proj"] = np.concatenate([gate, up], -1).copy("C")
            found[f"{block}.experts.down_proj"] = down.copy("C")
    return found


def test_the_text_model_of_qwen3_vl_is_qwen3_moe(tmp_path):
    record = recorded("qwen3_moe", tmp_path)
    tensors = joined(load_file(tmp_path / "model.safetensors"))
    tensors = {name.replace("model.", "model.language_model.", 1): t for name, t in tensors.items()}
    tensors["model.visual.patch.weight"] = np.zeros((2, 2), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    text = json.loads((tmp_path / "config.json").read_text())
    rope = text["rope_parameters"] | {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text |= {"model_type": "qwen3_vl_moe_text", "rope_parameters": rope}
    outer = {"model_type": "qwen3_vl_moe", "text_config": text, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    loaded = load(tmp_path)
    assert_same_function(loaded, record)
    assert loaded.family == "qwen3_moe"


@pytest.mark.parametrize(
    ("case", "keys"),
    [
        (
            "afmoe",
            # Trinity Nano, Mini and Large (arcee-ai): keys of the code in the releases.
            dict.fromkeys(("n_group", "topk_group", "num_limited_groups", "num_expert_groups"), 1)
            | {"score_func": "sigmoid", "route_norm": True, "use_grouped_mm": True}
            | {"load_balance_coeff": 5e-4, "rope_theta": 10000, "rope_scaling": None},
        ),
        # FlexOlmo's mixtures of two experts (allenai): a key of OLMoE.
        ("flex_olmo", {"clip_qkv": None, "rope_theta": 500000, "rope_scaling": None}),
    ],
)
def test_files_of_releases_with_keys_that_transformers_dropped(tmp_path, case, keys):
    record = recorded(case, tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    keys |= {"rope_theta": text.pop("rope_parameters")["rope_theta"]}
    text.pop("attention_bias", None)
    (tmp_path / "config.json").write_text(json.dumps(text | keys))
    assert_same_function(load(tmp_path), record)
    if case == "afmoe":
        edited(tmp_path, route_norm=False)
        refused(tmp_path, "says route_norm=False, but only True is supported")


def test_a_name_of_deepseek_v3_that_transformers_does_not_know(tmp_path):
    # Kimi K2's files have a model_type of their own; an export has the one of transformers.
    (tmp_path / "there").mkdir()
    record = recorded("kimi_k2", tmp_path / "there")
    edited(tmp_path / "there", model_type="kimi_k2")
    loaded = load(tmp_path / "there")
    assert_same_function(loaded, record)
    save(loaded.model, tmp_path / "back", loaded.family, original=loaded.original)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["model_type"] == "deepseek_v3"
    assert written["eos_token_id"] == loaded.original["eos_token_id"]


def test_a_module_that_looks_ahead_is_announced_but_not_stored(tmp_path):
    # As transformers writes it, which has no such module.
    record = recorded("deepseek_v3", tmp_path)
    edited(tmp_path, num_nextn_predict_layers=1)
    loaded = load(tmp_path)
    assert loaded.config.lookahead == 0
    assert_same_function(loaded, record)
