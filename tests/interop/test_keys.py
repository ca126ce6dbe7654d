"""Every key of ``config.json``: used, known to change nothing, or refused by name."""

import dataclasses
import json

import numpy as np
import pytest

from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface import FAMILIES
from moe_jax.interop.huggingface.keys import Key, Keys, number, size
from moe_jax.interop.huggingface.unread import EVERYWHERE
from tests.parity.compare_models import FIXTURES, RECORDED, family_of

# Values that some key cannot have; a family takes them or refuses them in one line.
ODD = (None, True, -1, 0, 3, 1e9, float("nan"), "x", [], [7], ["x"], {}, {"x": 1})
NOT_OF_TRANSFORMERS = {
    "attn_type_list",  # of MiniMax's own files
    "aux_loss_alpha",  # of DeepSeek's own files
    "decoder_sparse_step",  # written by transformers, computed where it is not there
    "encoder_sparse_step",
    "global_head_dim",  # of Gemma 4's files, which transformers takes out of the arguments
    "num_global_key_value_heads",
    "per_layer_config",  # of the base class
    "head_dim",  # of families whose class has none, and whose model reads it if a file does
    "is_gated_act",
    "moe_layer_freq",
    "num_nextn_predict_layers",  # ``num_mtp_layers`` is its newest name
    "original_max_position_embeddings",
    "score_func",  # of the own files of Trinity
    "route_norm",
    "n_group",
    "topk_group",
    "num_limited_groups",
    "num_expert_groups",
    "partial_rotary_factor",
    "moe_gate",  # of ERNIE's own files
    "moe_use_aux_free",
    "moe_intermediate_size",  # of Hunyuan's own files
    "moe_layer_num_skipped",
    "mlp_bias",
    "num_shared_expert",
    "use_cla",
    "use_mixed_mlp_moe",
    "use_mla",
    "qk_norm_type",
    "rope_interleave",
    "rope_scaling",
    "rope_theta",
    "rotary_dim",  # MiniMax-M2
    "scoring_func",
    "shared_intermediate_size",
    "sliding_window",  # OLMoE
    "topk_method",  # DeepSeek-V3
    "uniform_expert_assignment",
    "use_qk_norm",  # MiniMax-M2, whose model always has these norms
    "use_routing_bias",
    "max_position_embeddings",  # DBRX: ``max_seq_len``
}

# Models of some families cannot be built without these numbers, which have no default.
NEEDED = {"num_experts_per_tok", "n_routed_experts", "num_experts", "top_k_experts"} | {
    "moe_intermediate_size"
}


def config_of(case):
    return json.loads(str(np.load(FIXTURES / f"{case}.npz")["header"]))["config"]


CASE_OF = {family_of(case): case for case in reversed(RECORDED)}
CASES = pytest.mark.parametrize("family", FAMILIES)


def outcome(family, config):
    """Returns what a family reads, or the one line with which it refuses."""
    try:
        return FAMILIES[family].read(config)
    except ConfigError as error:
        assert "\n" not in str(error)
        return str(error)


def test_defaults_fill_what_is_absent_and_null_means_none_where_it_may():
    keys = Keys({"a": size(3), "b": number(None, null=True)}, {"c": "nothing"}, {"d": "a"})
    assert keys.filled({}) == {"a": 3, "b": None}
    assert keys.filled({"d": 5, "b": None, "c": {}, "_private": 1}) == {"a": 5, "b": None}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([1], "config.json is [1], but it must be an object"),
        ({"a": None}, "config.json says a=null, but it must be a whole number"),
        ({"a": 2.5}, "a in config.json is 2.5, but it must be a whole number"),
        ({"a": True}, "a in config.json is True, but it must be a whole number"),
        ({"a": 0}, "a in config.json is 0, but it must be at least 1"),
        ({"e": "z"}, "config.json says e='z', but only 'x' or 'y' is supported"),
        ({"a": 2, "d": 3}, "config.json says a=2 and d=3, which are two names of one setting"),
        ({"f": [1, "2"]}, "an element of f in config.json is '2', but it must be a whole number"),
        ({"ab": 1}, "config.json has the key 'ab', which this family does not have; the nearest"),
    ],
)
def test_a_value_that_cannot_be_is_refused_in_one_line(config, message):
    read = {"a": size(3), "e": Key(str, "x", only=("x", "y")), "f": Key(list, [], items=int)}
    with pytest.raises(ConfigError) as error:
        Keys(read, {}, {"d": "a"}).filled(config)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@CASES
def test_every_reason_is_a_sentence_and_no_key_is_both_read_and_unread(family):
    keys = FAMILIES[family].keys
    assert all(len(reason.split()) > 2 for reason in keys.unread.values())
    assert not (set(keys.read) & set(keys.unread)) - {"pad_token_id"}
    assert set(keys.aliases.values()) <= set(keys.read)
    assert not set(keys.aliases) & {*keys.read, *keys.unread}


@CASES
def test_a_key_that_is_spelt_wrong_is_refused_by_name(family):
    config = config_of(CASE_OF[family])
    for name in config:
        if not name.startswith("_"):
            wrong = {key: value for key, value in config.items() if key != name} | {name + "z": 1}
            assert f"the key '{name}z'" in outcome(family, wrong)


@CASES
def test_an_odd_value_of_any_key_is_read_or_refused_in_one_line(family):
    config = config_of(CASE_OF[family])
    for name in FAMILIES[family].keys.read:
        for value in ODD:
            outcome(family, config | {name: value})
    for rope in ({"rope_type": "yarn"}, {"type": "linear"}, {"rope_type": 3}, {"factr": 2.0}):
        outcome(family, config | {"rope_parameters": rope})
        outcome(family, config | {"rope_scaling": rope})


@CASES
@pytest.mark.parametrize("odd", [[1], "text", 3, None])
def test_an_object_that_is_something_else_is_refused(family, odd):
    assert "it must be an object" in outcome(family, odd)


def theirs(family, config):
    """Returns all settings as ``transformers`` itself fills them in, or ``None`` if it refuses."""
    transformers = pytest.importorskip("transformers", reason="run `make parity`")
    kind = transformers.models.auto.configuration_auto.CONFIG_MAPPING[family]
    try:
        found = kind.from_dict(dict(config))
        return json.loads(json.dumps(found.to_dict(), default=str))
    except Exception:
        return None


def assert_same_as_theirs(family, config):
    full = theirs(family, config)
    mine = outcome(family, config)
    if isinstance(mine, str) or full is None:
        return mine
    wanted = outcome(family, full)
    if isinstance(wanted, str):
        return wanted
    assert mine == wanted, config
    return None


@CASES
def test_the_defaults_are_those_of_transformers(family):
    transformers = pytest.importorskip("transformers", reason="run `make parity`")
    kind = transformers.models.auto.configuration_auto.CONFIG_MAPPING[family]
    keys = FAMILIES[family].keys
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    for name, key in keys.read.items():
        if name in defaults:
            assert key.default == defaults[name], name
            if defaults[name] is None:
                assert key.null or name in NEEDED, name
        else:
            assert name in NOT_OF_TRANSFORMERS, name
    if "rope_theta" in keys.read and family != "dbrx":
        assert keys.read["rope_theta"].default == kind.default_theta
    for name, other in kind.attribute_map.items():
        assert keys.aliases.get(name) == other or keys.aliases.get(other) == name
    known = {*keys.read, *keys.unread, *keys.aliases}
    assert {name for name in defaults if not name.startswith("_")} <= known


@CASES
def test_a_key_that_is_absent_or_null_is_read_as_transformers_reads_it(family):
    config = theirs(family, config_of(CASE_OF[family]))
    assert assert_same_as_theirs(family, config) is None
    refused = set()
    for name in config:
        less = {key: value for key, value in config.items() if key != name}
        if assert_same_as_theirs(family, less):
            refused.add(name)
        assert_same_as_theirs(family, config | {name: None})
    # Without these a file says something else that no model can be, such as heads that do not fit.
    assert refused <= {"num_attention_heads", "n_heads", "num_hidden_layers", "num_layers"} | {
        "num_key_value_heads",
        "attn_config",
        "encoder_attention_heads",
        "decoder_attention_heads",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
        "num_experts_per_tok",
        "hidden_size",
        "d_model",
        "n_routed_experts",
        "n_group",
        "topk_group",
        "num_local_experts",
        "num_experts",
        # Gemma 4 without experts or with embeddings per layer, and layers of other kinds than
        # those whose heads the file lists.
        "top_k_experts",
        "moe_intermediate_size",
        "enable_moe_block",
        "hidden_size_per_layer_input",
        "layer_types",
    }


@CASES
def test_another_name_of_a_key_is_the_same_key(family):
    config = theirs(family, config_of(CASE_OF[family]))
    for other, name in FAMILIES[family].keys.aliases.items():
        if name in config:
            renamed = {key: value for key, value in config.items() if key != name}
            assert outcome(family, renamed | {other: config[name]}) == outcome(family, config)


def test_keys_of_every_configuration_of_transformers_are_known():
    transformers = pytest.importorskip("transformers", reason="run `make parity`")
    base = set(transformers.PreTrainedConfig().to_dict())
    generation = set(transformers.GenerationConfig().to_dict()) - {"use_cache"}
    assert {name for name in base if not name.startswith("_")} <= set(EVERYWHERE)
    assert {"temperature", "top_k", "max_length"} <= generation & set(EVERYWHERE)
