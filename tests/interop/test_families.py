"""Keys of ``config.json`` that single families read in a way of their own."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from moe_jax import models
from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface import FAMILIES, load, save
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
