"""Keys of ``config.json`` that single families read in a way of their own."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from moe_jax import models
from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface import FAMILIES, load, save
from moe_jax.nn.positions import Rotary
from tests.interop.test_keys import config_of


def test_keys_of_minimax_files_that_describe_other_models_are_refused():
    released = config_of("minimax_m2") | {
        "attn_type_list": [1, 1],
        "qk_norm_type": "per_layer",
        "use_mtp": True,
        "num_mtp_modules": 3,
        "rotary_dim": 4,
    }
    assert FAMILIES["minimax_m2"].read(released).positions.share == 0.5
    for changes, match in (
        ({"attn_type_list": [0, 1]}, "attn_type_list in config.json has layers with linear"),
        ({"qk_norm_type": "per_head"}, "qk_norm_type='per_head', but only 'per_layer'"),
        ({"shared_intermediate_size": 8}, "shared_intermediate_size=8, but only 0"),
    ):
        with pytest.raises(ConfigError, match=match):
            FAMILIES["minimax_m2"].read(released | changes)


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, (1, 2)),  # from layer 1 on, by default; the last layer is 2
        ({"moe_layer_start_index": 0}, (0, 1, 2)),
        ({"moe_layer_end_index": 1}, (1,)),
        ({"moe_layer_end_index": 9}, (1, 2)),
        ({"moe_layer_interval": 2}, (1,)),  # layers 1, 3, ...
    ],
)
def test_layers_of_ernie_have_experts_from_a_start_to_an_end(changes, layers):
    config = config_of("ernie4_5_moe") | {"moe_layer_end_index": -1}
    assert FAMILIES["ernie4_5_moe"].read(config | changes).moe.layers == layers


def exaone(**changes):
    config = config_of("exaone_moe")
    kept = {k: v for k, v in config.items() if k not in ("layer_types", "mlp_layer_types")}
    return FAMILIES["exaone_moe"].read(kept | changes)


@pytest.mark.parametrize(
    ("pattern", "full"),
    [(4, (3,)), (2, (1, 3)), ("LLG", (2, 4)), ("LG", (1, 3, 4)), (None, (0, 1, 2, 3, 4))],
)
def test_layers_of_exaone_rotate_only_with_a_window(pattern, full):
    # With letters the last of the five layers has full attention in any case.
    decoder = exaone(sliding_window_pattern=pattern)
    attention = [decoder.attention_at(i) for i in range(5)]
    assert tuple(i for i, layer in enumerate(attention) if layer.rotary is None) == full
    assert [layer.details.window for layer in attention] == [
        0 if i in full else 4 for i in range(5)
    ]


def test_without_a_window_all_layers_of_exaone_rotate():
    decoder = exaone(sliding_window=None)
    assert all(decoder.attention_at(i).rotary is not None for i in range(5))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"sliding_window_pattern": "LX"}, "sliding_window_pattern='LX', but it must be"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern=0, but it must be"),
        ({"mlp_layer_types": ["sparse", "dense"] + ["sparse"] * 3}, "first dense ones and then"),
        ({"mlp_layer_types": ["dense"]}, "must name 5 layers"),
    ],
)
def test_patterns_of_exaone_that_cannot_be_are_refused(changes, match):
    with pytest.raises(ConfigError, match=match) as error:
        exaone(**changes)
    assert "\n" not in str(error.value)


def hunyuan(**changes):
    config = config_of("hunyuan_v1_moe") | {"moe_topk": 3, "rope_parameters": {"rope_theta": 1e4}}
    return FAMILIES["hunyuan_v1_moe"].read(config | changes)


def test_hunyuan_files_state_a_number_once_or_once_per_layer():
    per_layer = {"moe_topk": [3, 3], "moe_intermediate_size": [10, 10], "num_shared_expert": [1, 1]}
    assert hunyuan(**per_layer) == hunyuan()
    for name, given, match in (
        ("moe_topk", [3, 2], "moe_topk in config.json differs between layers"),
        ("moe_topk", ["x"], "moe_topk in config.json is 'x', but it must be a whole number"),
        ("moe_intermediate_size", 12, "moe_intermediate_size=12, but only 10 is supported"),
        ("num_shared_expert", 2, "num_shared_expert=2, but only 1 is supported"),
        ("use_cla", True, "use_cla=True, but only False is supported"),
    ):
        with pytest.raises(ConfigError, match=match):
            hunyuan(**{name: given})


def gemma(**changes):
    return FAMILIES["gemma4_text"].read(config_of("gemma4") | changes)


def test_heads_of_gemma_have_an_older_and_a_newer_spelling():
    # transformers 5.5 wrote the heads of layers without a window, 5.24 those of every layer.
    newer = config_of("gemma4")
    assert newer["per_layer_config"].keys() == {"1", "3"} and "global_head_dim" not in newer
    older = {"global_head_dim": 12, "num_global_key_value_heads": 1, "per_layer_config": None}
    assert gemma(**older) == gemma()
    found = [gemma().attention_at(i) for i in range(4)]
    assert [(a.head_dim, a.num_kv_heads, a.details.window) for a in found] == [
        *((8, 2, 4), (12, 1, 0)),
        *((8, 2, 4), (12, 1, 0)),
    ]
    # Layers with values of their own have as many heads as the others.
    own = gemma(**older | {"attention_k_eq_v": False}).attention_at(1)
    assert (own.num_kv_heads, own.details.keys_as_values) == (2, False)


def test_layers_that_gemma_files_leave_out():
    # Every sixth layer has no window, and the last one never has; the bases are 1e4 and 1e6.
    left_out = {"layer_types": None, "rope_parameters": None, "per_layer_config": None}
    decoder = gemma(num_hidden_layers=8, **left_out)
    layers = [decoder.attention_at(i) for i in range(8)]
    assert [i for i, layer in enumerate(layers) if not layer.details.window] == [5, 7]
    assert [layers[i].rotary for i in (0, 5)] == [
        Rotary(1e4),
        Rotary(1e6, share=0.25, proportional=True),
    ]
    assert (layers[5].head_dim, layers[5].num_kv_heads) == (512, 2)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"enable_moe_block": False}, "enable_moe_block=False, but only True is supported"),
        ({"hidden_size_per_layer_input": 256}, "hidden_size_per_layer_input=256, but only 0"),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers=2, but only 0 is supported"),
        ({"use_bidirectional_attention": "all"}, "'all', but only 'vision' is supported"),
        ({"per_layer_config": {"0": {"head_dim": 4}}}, "equally in all layers with full_attention"),
        ({"per_layer_config": {"1": {"hidden_size": 4}}}, "head_dim and num_key_value_heads alone"),
        ({"per_layer_config": {"1": {"head_dim": "x"}}}, "head_dim in per_layer_config.1"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "full_attention in rope_parameters of config"),
    ],
)
def test_parts_of_gemma_that_are_not_supported_are_refused_in_one_line(changes, match):
    with pytest.raises(ConfigError, match=match) as error:
        gemma(**changes)
    assert "\n" not in str(error.value)


def test_a_share_that_turns_no_pair_of_gemma_is_refused():
    rope = config_of("gemma4")["rope_parameters"]
    rope = rope | {"full_attention": rope["full_attention"] | {"partial_rotary_factor": 0.1}}
    with pytest.raises(ConfigError, match="rotates no pair of the 12 features"):
        gemma(rope_parameters=rope)


def test_alpha_stretches_the_base_of_hunyuan():
    # With heads of 8 features the base 10000 becomes 10000 x 50^(8/6).
    scaled = {"type": "dynamic", "alpha": 50.0, "factor": 1.0}
    found = hunyuan(rope_scaling=scaled, rope_theta=1e4, rope_parameters=None)
    assert found.positions.base == pytest.approx(1e4 * 50 ** (4 / 3))
    with pytest.raises(ConfigError, match="rope_type='dynamic'; known: linear, llama3, yarn"):
        hunyuan(rope_scaling={"type": "dynamic", "factor": 2.0})


def test_a_module_that_looks_ahead_is_stored_as_a_layer_of_glm(tmp_path):
    config = FAMILIES["glm4_moe"].read(config_of("glm4_moe"))
    config = dataclasses.replace(config, lookahead=1)
    model = models.make(config, 43, jax.random.key(0))
    save(model, tmp_path, "glm4_moe")
    again = load(tmp_path)
    assert again.config.lookahead == 1
    for one, other in zip(*map(jax.tree.leaves, map(nnx.state, (model, again.model))), strict=True):
        np.testing.assert_array_equal(one, other)


def test_mistral_4_without_rotary_parameters_has_those_of_transformers():
    config = {k: v for k, v in config_of("mistral4").items() if k != "rope_parameters"}
    decoder = FAMILIES["mistral4"].read(config)
    assert (decoder.attention.temperature, decoder.attention.temperature_length) == (0.1, 8192)
    assert decoder.positions.scaling.factor == 128
    # The square of 1 + 0.1 log 128 over the root of the width of a head: 6 plain, 4 rotated.
    assert decoder.attention.scale == pytest.approx((1 + 0.1 * np.log(128)) ** 2 / np.sqrt(10))


def test_older_and_repeated_keys_of_mistral_4_give_the_same_model():
    config = config_of("mistral4")
    rope = {k: v for k, v in config["rope_parameters"].items() if k != "partial_rotary_factor"}
    rope["type"] = rope.pop("rope_type")
    older = {k: v for k, v in config.items() if k not in ("rope_parameters", "n_routed_experts")}
    older |= {"rope_scaling": rope, "num_local_experts": config["n_routed_experts"]}
    read = FAMILIES["mistral4"].read
    assert read(older) == read(config)


def test_layers_of_trinity_without_their_kinds_have_a_period():
    config = {k: v for k, v in config_of("afmoe").items() if k != "layer_types"}
    config |= {"num_hidden_layers": 4, "global_attn_every_n_layers": 2}
    decoder = FAMILIES["afmoe"].read(config)
    attention = [decoder.attention_at(i) for i in range(4)]
    assert [layer.details.window for layer in attention] == [4, 0, 4, 0]
    assert [layer.rotary is None for layer in attention] == [False, True, False, True]


def test_defaults_of_flex_olmo_that_a_file_omits():
    config = config_of("flex_olmo")
    kept = ("vocab_size", "hidden_size", "num_attention_heads", "max_position_embeddings")
    decoder = FAMILIES["flex_olmo"].read({name: config[name] for name in kept})
    assert decoder.positions.base == 500000.0
    assert (decoder.moe.num_experts, decoder.moe.router.select.k) == (7, 5)
    assert decoder.norm.place == "output"
