"""What a model's configuration refuses, and which layers an override names."""

import pytest

from moe_jax.errors import ConfigError
from moe_jax.models import AttentionOverride, DecoderConfig, EncoderDecoderConfig
from moe_jax.nn.attention import Details
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


def test_positions_that_do_not_rotate_leave_attention_alone():
    assert DecoderConfig(positions=T5Relative()).attention_at(0).rotary is None
