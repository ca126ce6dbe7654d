"""Rotation as files of all ages say it."""

import pytest

from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface.llama_like import partly_rotary
from moe_jax.interop.huggingface.rotary import rotary
from moe_jax.nn.positions import LinearScaling, Llama3Scaling, Rotary, YarnScaling

NOTHING = {
    "max_position_embeddings": 64,
    "original_max_position_embeddings": None,
    "partial_rotary_factor": None,
    "rope_parameters": None,
    "rope_scaling": None,
    "rope_theta": 500.0,
}
LLAMA3 = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, Rotary(500.0)),
        ({"rope_parameters": {"rope_theta": 7.0}}, Rotary(7.0)),
        ({"rope_parameters": {"rope_theta": None, "factor": None}}, Rotary(500.0)),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 7}}, Rotary(7.0)),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}},
            Rotary(500.0, scaling=LinearScaling(2.0)),
        ),
        # Where a file has both forms, transformers reads the older one.
        (
            {
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 7.0},
            },
            Rotary(500.0, scaling=LinearScaling(2.0)),
        ),
        (
            {"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.25}},
            Rotary(500.0, share=0.25, proportional=True),
        ),
        (
            {"rope_parameters": {"rope_type": "proportional", "factor": 8.0}},
            Rotary(500.0, scaling=LinearScaling(8.0), proportional=True),
        ),
        # The first length is that of the scaling, else of the file, else all that there is.
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            Rotary(500.0, scaling=YarnScaling(4.0, 64)),
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", **LLAMA3}},
            Rotary(500.0, scaling=Llama3Scaling(8.0, 1.0, 4.0, 64)),
        ),
        (
            {
                "original_max_position_embeddings": 16,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32,
                },
            },
            Rotary(500.0, scaling=YarnScaling(4.0, 16)),
        ),
    ],
)
def test_the_same_rotation_in_every_form(given, wanted):
    assert rotary(NOTHING | given) == wanted


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "yarn"}, "config.json lacks factor, which rope_type='yarn' needs"),
        ({"rope_type": "yarn", "factor": 0}, "says factor=0, but it must be more than 0"),
        ({"rope_type": "llama3", "factor": 8.0}, "config.json lacks low_freq_factor"),
        ({"rope_type": "odd"}, "rope_type='odd'; known: linear, llama3, yarn"),
        (
            {"rope_type": "linear", "factr": 2},
            "has the unknown key 'factr'; the nearest known key is",
        ),
        ({"rope_type": 3}, "rope_type in rope_parameters is 3, but it must be a string"),
        ({"partial_rotary_factor": 0.5}, "but only 1.0 is supported"),
        ({"partial_rotary_factor": 0.0}, "factor=0.0, but only 1.0 is supported"),
    ],
)
def test_a_rotation_that_cannot_be_is_refused(rope, message):
    with pytest.raises(ConfigError, match=message) as error:
        rotary(NOTHING | {"rope_parameters": rope})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "share"),
    [
        ({}, 1.0),
        ({"partial_rotary_factor": 0.25}, 0.25),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, 0.5),
        # The parameters of rotation take precedence over the key of the file.
        ({"partial_rotary_factor": 0.25, "rope_parameters": {"partial_rotary_factor": 0.5}}, 0.5),
    ],
)
def test_a_family_may_rotate_a_part_of_each_head(given, share):
    assert rotary(NOTHING | given, partial=True) == Rotary(500.0, share=share)


def test_a_share_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="only a share above 0 and up to 1 is supported"):
        rotary(NOTHING | {"partial_rotary_factor": 2.0}, partial=True)


def test_features_are_rotated_in_pairs():
    # 0.5 of a head of 6 features is 3 features, which are no pairs.
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 24}
    config = NOTHING | heads | {"head_dim": None, "partial_rotary_factor": 0.5}
    with pytest.raises(ConfigError, match="rotates 3 of the 6 features of a head, but features"):
        partly_rotary(config)
    assert partly_rotary(config | {"head_dim": 8}).rotated(8) == 4


def test_no_base_at_all_is_refused():
    with pytest.raises(ConfigError, match="config.json lacks rope_theta"):
        rotary(NOTHING | {"rope_theta": None})
