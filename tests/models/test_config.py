"""What a model's configuration refuses, and which layers an override names."""

import pytest

from moe_jax.errors import ConfigError
from moe_jax.models import AttentionOverride, DecoderConfig, EncoderDecoderConfig
from moe_jax.nn.attention import Details
from moe_jax.nn.attention_experts import AttentionExpertsConfig
from moe_jax.nn.latent import Latent
from moe_jax.nn.positions import Rotary, Sinusoidal, T5Relative


@pytest.mark.parametrize(
    ("kind", "settings", "match"),
    [
        (DecoderConfig, {"num_layers": 0}, "DecoderConfig.num_layers=0"),
        (DecoderConfig, {"width": 0}, "DecoderConfig.width=0"),
        (DecoderConfig, {"num_kv_heads": 3}, "model.num_heads=4 is not a multiple"),
        (
            DecoderConfig,
            {"attention": Latent(), "positions": Sinusoidal()},
            "model.positions.type=Rotary",
        ),
        (
            DecoderConfig,
            {"attention": Latent(), "attention_overrides": (AttentionOverride(every=2),)},
            "unset model.attention_overrides",
        ),
        (
            DecoderConfig,
            {"attention_overrides": (AttentionOverride(every=2, num_kv_heads=3),)},
            r"is not a multiple of model.attention_overrides\[0\].num_kv_heads=3",
        ),
        (
            DecoderConfig,
            {"attention_overrides": (AttentionOverride(every=2, head_dim=5),)},
            r"model.attention_overrides\[0\].head_dim=5 is odd",
        ),
        (
            DecoderConfig,
            {
                "attention": Details(keys_as_values=True),
                "attention_experts": AttentionExpertsConfig(every=2),
            },
            "unset model.attention_experts, or keys_as_values",
        ),
        (EncoderDecoderConfig, {"positions": Rotary()}, "model.positions.type to T5Relative"),
        (EncoderDecoderConfig, {"decoder_layers": 0}, "EncoderDecoderConfig.decoder_layers=0"),
    ],
)
def test_what_is_refused(kind, settings, match):
    with pytest.raises(ConfigError, match=match):
        kind(**settings)


def test_overrides_name_layers():
    # Every fourth layer rotates nothing; of the others layer 1 has a window.
    config = DecoderConfig(
        num_layers=8,
        attention=Details(chunk=4),
        attention_overrides=(
            AttentionOverride(every=4, rotary=False),
            AttentionOverride(layers=(1, 3), details=Details(window=2)),
        ),
    )
    found = [config.attention_at(i) for i in range(8)]
    assert [layer.rotary is None for layer in found] == [False, False, False, True] * 2
    assert [layer.details.window for layer in found] == [0, 2, 0, 0, 0, 0, 0, 0]
    assert [layer.details.chunk for layer in found] == [4, 0, 4, 0, 4, 4, 4, 0]


def test_overrides_replace_heads_and_positions():
    full = AttentionOverride(every=2, num_kv_heads=1, head_dim=64, positions=Rotary(1e6))
    config = DecoderConfig(num_layers=2, num_kv_heads=2, attention_overrides=(full,))
    found = [config.attention_at(i) for i in range(2)]
    assert [layer.num_kv_heads for layer in found] == [2, 1]
    assert [layer.head_dim for layer in found] == [32, 64]
    assert [layer.rotary.base for layer in found] == [1e4, 1e6]
    needs = list(config.attentions().values())
    assert [(n.kv_heads, n.key_dim, n.value_dim) for n in needs] == [(2, 32, 32), (1, 64, 64)]
    with pytest.raises(ConfigError, match="rotary=False has no positions"):
        AttentionOverride(rotary=False, positions=Rotary())


def test_positions_that_do_not_rotate_leave_attention_alone():
    assert DecoderConfig(positions=T5Relative()).attention_at(0).rotary is None
