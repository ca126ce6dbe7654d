import dataclasses

import jax
import pytest

from moe_jax import attend
from moe_jax.attend import Choice, Needs, choice
from moe_jax.errors import ConfigError
from moe_jax.models import DecoderConfig, EncoderDecoderConfig
from moe_jax.models.config import AttentionOverride
from moe_jax.nn.attention import Details
from moe_jax.nn.latent import Latent
from moe_jax.parallel import MeshConfig, make_mesh

PLAIN = Needs("bfloat16", heads=4, kv_heads=2, key_dim=64, value_dim=64)


@pytest.fixture
def on(monkeypatch):
    """Returns a function that names the platform that programs are traced for."""
    return lambda name: monkeypatch.setattr(choice, "platform", lambda: name)


@pytest.mark.parametrize(
    ("here", "name"), [("tpu", "splash"), ("gpu", "cudnn"), ("cpu", "blocks"), ("other", "blocks")]
)
def test_auto_is_the_kernel_of_the_platform(on, here, name):
    on(here)
    assert attend.choose("auto", PLAIN) == Choice(name)
    assert attend.choose("blocks", PLAIN) == Choice("blocks")


@pytest.mark.parametrize(
    ("here", "change", "reason"),
    [
        ("tpu", {"relative": True}, "relative positions"),
        ("tpu", {"own": False}, "neither a cache nor a memory"),
        ("gpu", {"relative": True}, "relative positions"),
        ("gpu", {"own": False}, "neither a cache nor a memory"),
        ("gpu", {"sinks": True}, "no sinks"),
        ("gpu", {"dtype": "float32"}, "not float32"),
        ("gpu", {"key_dim": 192, "value_dim": 128}, "keys of 192 and values of 128"),
        ("gpu", {"key_dim": 256, "value_dim": 256}, "not 256"),
        ("gpu", {"key_dim": 20, "value_dim": 20}, "not 20"),
    ],
)
def test_what_a_kernel_lacks_falls_back_with_its_reason(on, here, change, reason):
    on(here)
    found = attend.choose("auto", dataclasses.replace(PLAIN, **change))
    assert found.name == "blocks"
    assert found.instead_of == {"tpu": "splash", "gpu": "cudnn"}[here]
    assert reason in found.reason


def test_the_tpu_kernel_expresses_sinks_float32_and_wide_keys(on):
    on("tpu")
    needs = dataclasses.replace(PLAIN, sinks=True, dtype="float32", key_dim=192)
    assert attend.choose("auto", needs) == Choice("splash")


@pytest.mark.parametrize(
    ("mesh", "reason"),
    [(MeshConfig(1, sequence=4), "mesh.sequence"), (MeshConfig(1, model=4), "mesh.model=4")],
)
def test_the_tpu_kernel_needs_whole_lengths_and_even_heads(on, mesh, reason):
    on("tpu")
    with jax.set_mesh(make_mesh(mesh, jax.devices()[:4])):
        assert reason in attend.choose("auto", PLAIN).reason


def test_a_named_kernel_that_does_not_run_is_one_line(on):
    on("cpu")
    with pytest.raises(ConfigError) as raised:
        attend.check("splash", {"layer 0": PLAIN})
    assert str(raised.value) == (
        "model.attention_kernel=splash cannot compute layer 0: it runs on tpu and not on cpu; "
        "use auto or blocks"
    )
    on("tpu")
    attend.check("splash", {"layer 0": PLAIN})
    with pytest.raises(ConfigError, match="layer 1: it has no bias of relative positions"):
        attend.check(
            "splash", {"layer 0": PLAIN, "layer 1": dataclasses.replace(PLAIN, relative=True)}
        )


def test_the_line_at_the_start_names_the_fallback(on):
    on("gpu")
    sinks = AttentionOverride(layers=(1,), details=Details(sinks=True))
    model = DecoderConfig(num_layers=3, compute_dtype="bfloat16", attention_overrides=(sinks,))
    assert attend.summary(attend.check("auto", model.attentions())) == (
        "cudnn in 2 of 3 attentions (layer 0, layer 2); blocks in 1 of 3 attentions (layer 1), "
        "not cudnn: it has no sinks"
    )
    on("cpu")
    assert attend.summary(attend.check("auto", model.attentions())) == "blocks"


def test_the_needs_of_a_model_are_those_of_its_layers():
    latent = DecoderConfig(attention=Latent(plain_dim=8, rotary_dim=4, value_dim=6), num_layers=1)
    assert latent.attentions() == {"layer 0": Needs("float32", 4, 4, 12, 6)}
    t5 = EncoderDecoderConfig(encoder_layers=1, decoder_layers=1, num_kv_heads=2)
    assert t5.attentions() == dict.fromkeys(
        ("encoder layer 0", "decoder layer 0"), Needs("float32", 4, 2, 32, 32, relative=True)
    )
