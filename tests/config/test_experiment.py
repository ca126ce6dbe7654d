import dataclasses
import json
import re

import pytest
from moe_jax.configs import common, masked_language, quickstart, span_corruption

from moe_jax.config.experiment import Experiment, TrainingConfig
from moe_jax.config.schema import build, describe, flat, from_text, override
from moe_jax.counting import count
from moe_jax.data import Spans
from moe_jax.errors import ConfigError
from moe_jax.models import AttentionOverride, DecoderConfig, EncoderDecoderConfig
from moe_jax.nn.latent import Latent
from moe_jax.nn.moe_config import LayerOverride, MoEConfig
from moe_jax.nn.positions import Learned, Sinusoidal, T5Relative
from moe_jax.parallel import MeshConfig
from moe_jax.routing import preset
from tests.data.corpora import write_corpus

_SMALL = {"tokenizer": "bytes", "seq_length": 32, "batch_size": 8}


@pytest.fixture
def experiment(tmp_path):
    source = write_corpus(tmp_path, ["abc"], ["d"])
    moe = MoEConfig(num_experts=4, expert_dim=32, group_size=32)
    made = Experiment("x", DecoderConfig(num_layers=4, width=16, mlp_dim=32, moe=moe))
    return dataclasses.replace(made, data=dataclasses.replace(made.data, source=source, **_SMALL))


def _changed(value, path, new):
    head, _, rest = path.partition(".")
    new = _changed(getattr(value, head), rest, new) if rest else new
    return dataclasses.replace(value, **{head: new})


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(2, 4), MeshConfig(2, 2, 2)])
def test_accepts_every_mesh_that_fits(experiment, mesh):
    dataclasses.replace(experiment, mesh=mesh).check(8)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"mesh.data": 3}, ["mesh data=3", "8 devices", "mesh.data"]),
        ({"data.batch_size": 12}, ["data.batch_size=12", "multiple of 8"]),
        ({"training.microbatches": 2}, ["training.microbatches=2", "multiple of 16"]),
        ({"training.loss_chunk": 5}, ["training.loss_chunk=5", "seq_length=32"]),
        ({"model.moe.group_size": 48}, ["model.moe.group_size=48", "32 tokens"]),
        ({"model.moe.num_experts": 6, "mesh.expert": 4}, ["num_experts=6", "mesh.expert=4"]),
        ({"model.num_heads": 2, "mesh.model": 4}, ["model.num_heads=2", "mesh.model=4"]),
        ({"model.num_kv_heads": 2, "mesh.model": 4}, ["model.num_kv_heads=2"]),
        ({"model.mlp_dim": 30, "mesh.model": 4}, ["model.mlp_dim=30"]),
        ({"model.moe.expert_dim": 30, "mesh.model": 4}, ["model.moe.expert_dim=30"]),
    ],
)
def test_refuses_what_cannot_run(experiment, changes, parts):
    for path, value in changes.items():
        experiment = _changed(experiment, path, value)
    with pytest.raises(ConfigError) as error:
        experiment.check(8)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_dense_model_ignores_what_experts_need(experiment):
    for path, value in {"every": 0, "num_experts": 3, "group_size": 48}.items():
        experiment = _changed(experiment, f"model.moe.{path}", value)
    dataclasses.replace(experiment, mesh=MeshConfig(4, 2)).check(8)
    assert experiment.moe_layers == ()


def test_missing_files_are_refused(experiment):
    experiment = _changed(experiment, "data.source", "files:/nowhere/*.txt")
    with pytest.raises(FileNotFoundError, match="/nowhere"):
        experiment.check(8)


# Settings of a decoder of 4 layers and rows of 32 tokens of bytes, which have fewer than 300 ids.
_ANOTHER_MODEL = [
    ({"model.positions": Learned(31)}, "positions.length=31 is shorter than data.seq_length=32"),
    (
        {"model.moe.router": preset("hash", kind="balanced", vocab_size=99)},
        "vocab_size=99 of the hash router is less than",
    ),
    ({"model.moe.every": 5}, "model.moe.every=5 is beyond the 4 layers"),
    ({"model.moe.last": 3}, "model.moe.last=3, but only 2 of the 4 layers"),
    ({"model.moe.layers": (1, 1)}, "model.moe.layers names layer 1 twice"),
    ({"model.moe.overrides": (LayerOverride((1, 1)),)}, "moe.overrides names layer 1 twice"),
    (
        {"model.moe.overrides": (LayerOverride((1,)), LayerOverride((3, 1)))},
        "model.moe.overrides names layer 1 twice",
    ),
    ({"model.moe.overrides": (LayerOverride((4,)),)}, "names layer 4, but layers are 0 to 3"),
    (
        {
            "model.moe.overrides": (LayerOverride((1,), expert_dim=8),),
            "model.moe.expert_dims": (8, 16),
        },
        "overrides sets expert_dim, which model.moe.expert_dims",
    ),
    ({"model.attention_experts.every": 5}, "model.attention_experts.every=5 is beyond the 4"),
    ({"model.attention_experts.layers": (0, 0)}, "attention_experts.layers names layer 0 twice"),
    (
        {"model.attention_overrides": (AttentionOverride(layers=(4,)),)},
        "model.attention_overrides has layer 4, but layers are 0 to 3",
    ),
    ({"model.attention_overrides": (AttentionOverride(every=5),)}, "has every=5, but layers are"),
    (
        {"model.attention_overrides": (AttentionOverride(layers=(1,)),) * 2},
        "model.attention_overrides names layer 1 twice",
    ),
    ({"model.lookahead": 32}, "model.lookahead=32 is beyond data.seq_length=32"),
]


@pytest.mark.parametrize(("changes", "message"), _ANOTHER_MODEL)
def test_settings_that_quietly_mean_another_model_are_refused(experiment, changes, message):
    with pytest.raises(ConfigError, match=message):
        for path, value in changes.items():
            experiment = _changed(experiment, path, value)
        experiment.check_settings()


def test_what_is_learned_of_positions_may_be_as_long_as_a_row(experiment):
    _changed(experiment, "model.positions", Learned(32)).check_settings()


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (DecoderConfig, {"head_dim": 7}, "model.head_dim=7 is odd"),
        (DecoderConfig, {"attention": Latent(rotary_dim=3)}, "attention.rotary_dim=3 is odd"),
        (DecoderConfig, {"positions": Sinusoidal(), "width": 3}, "model.width=3 is too small"),
        (DecoderConfig, {"positions": T5Relative(8, max_distance=4)}, "max_distance=4"),
        (DecoderConfig, {"num_heads": 4, "num_kv_heads": 3}, "not a multiple"),
    ],
)
def test_sizes_that_positions_and_heads_cannot_have_are_refused(model, settings, message):
    with pytest.raises(ConfigError, match=message):
        model(**settings)


def test_an_odd_head_is_no_harm_where_nothing_turns():
    DecoderConfig(head_dim=7, positions=Learned())


@pytest.mark.parametrize(
    "router",
    [
        preset("forced", k=9),
        preset("random", k=9),
        preset("mixtral"),
        preset("hierarchical", groups=3),
        preset("deepseek_v3", groups=3),
    ],
    ids=["forced", "random", "mixtral", "hierarchical", "deepseek_v3"],
)
def test_routers_refuse_experts_that_they_cannot_choose_among(router):
    with pytest.raises(ConfigError, match=r"model\.moe\.router: "):
        MoEConfig(num_experts=8 if router != preset("mixtral") else 1, router=router)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_moe_layers_are_every_nth(experiment, every):
    experiment = _changed(experiment, "model.moe.every", every)
    assert experiment.moe_layers == tuple(range(every - 1, 4, every))


@pytest.mark.parametrize("name", ["steps", "microbatches", "log_every", "checkpoint_every"])
def test_training_needs_positive_numbers(name):
    with pytest.raises(ConfigError, match=f"TrainingConfig.{name}=0 must be at least 1"):
        TrainingConfig(**{name: 0})


@pytest.fixture(scope="module")
def variants():
    return {name: build(Experiment, quickstart.get_config(name)) for name in quickstart.VARIANTS}


def test_variants_are_four(variants):
    assert variants.keys() == {"dense", "switch", "gshard", "expert_choice"}
    assert {len(made.moe_layers) for made in variants.values()} == {0, 2}
    assert [made.name for made in variants.values()] == [f"quickstart-{n}" for n in variants]


def test_variants_cost_the_same(variants):
    costs = {
        name: count(made.model, made.data.vocab_size, made.data.seq_length)
        for name, made in variants.items()
    }
    flops = [cost.flops_per_token for cost in costs.values()]
    assert max(flops) / min(flops) < 1.01
    assert costs["dense"].total == costs["dense"].active < costs["switch"].total


def test_unknown_variant_names_the_known_ones():
    with pytest.raises(ValueError, match="'swich'; known: switch, dense, gshard, expert_choice"):
        quickstart.get_config("swich")


def _overridden(overrides):
    """The quickstart with settings that are given as text."""
    config = quickstart.get_config()
    override(Experiment, config, overrides, lambda name, hint, text: from_text(hint, text))
    return config


def _other(value):
    """A value of the same type that differs, and how a flag says it."""
    if isinstance(value, bool):
        return not value, str(not value).lower()
    if isinstance(value, int | float):
        return value + 1, str(value + 1)
    return f"{value}x", f"{value}x"


def test_every_default_can_be_overridden():
    # Names of types, presets and items of lists are left alone: they must be known.
    names = {
        key: value
        for key, value in flat(quickstart.get_config().to_dict()).items()
        if value is not None and not re.search(r"\.(type|preset|\d+)$", key)
    }
    assert {"data.mixture.seed", "training.keep_every", "optimizer.schedule.final"} <= names.keys()
    expected = {key: _other(value) for key, value in names.items()}
    config = flat(_overridden({key: text for key, (_, text) in expected.items()}).to_dict())
    assert {key: config[key] for key in names} == {key: new for key, (new, _) in expected.items()}


def test_every_field_of_an_experiment_is_in_the_config():
    described = flat(describe(Experiment("x")))
    config = common.base("x")
    names = flat(config.to_dict()).keys()
    missing = [
        key
        for key in described.keys() - names
        if not key.startswith("model.attention_experts.router.")  # there as a preset
    ]
    assert "model.attention_experts.router.preset" in names
    # A part that is left out is an empty group.
    assert {"data.spans", "model.positions.scaling"} <= {*missing}
    assert all(len(_at(config, key)) == 0 for key in missing)


def _at(config, name):
    for key in name.split("."):
        config = config[key]
    return config


def test_a_config_prints_the_settings_in_force_alone():
    # What may be unset by itself, and is.
    unset = {"data.train_documents", "data.eval_documents", "data.data_dir", "model.moe.gated"}
    unset |= {"model.moe.exchange_buffer"}
    found = flat(quickstart.get_config().to_dict())
    assert {key for key, value in found.items() if value is None} == unset
    assert found["model.moe.router.preset"] == "switch"
    assert sum(key.startswith("model.moe.router.") for key in found) == 3


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [("data.eval_documents", "4", 4), ("data.data_dir", "/tmp/x", "/tmp/x")],
)
def test_settings_without_a_default_can_be_overridden(key, text, value):
    made = build(Experiment, _overridden({key: text}))
    assert flat(describe(made))[key] == value
    assert flat(describe(build(Experiment, quickstart.get_config())))[key] is None


def test_quickstart_survives_json(variants):
    for made in variants.values():
        assert build(Experiment, json.loads(json.dumps(describe(made)))) == made


def test_an_encoder_decoder_restores_spans_and_a_decoder_does_not(experiment):
    with pytest.raises(ConfigError, match="set data.spans.sentinels=100, or use DecoderConfig"):
        dataclasses.replace(experiment, model=EncoderDecoderConfig()).check(1)
    spans = dataclasses.replace(experiment.data, spans=Spans(), target_length=64)
    with pytest.raises(ConfigError, match="unset data.spans and data.target_length"):
        dataclasses.replace(experiment, data=spans).check(1)


@pytest.fixture
def encoder_decoder():
    return build(Experiment, span_corruption.get_config())


def test_span_corruption_variants_build_and_pass_the_checks(encoder_decoder):
    for variant in span_corruption.VARIANTS:
        made = build(Experiment, span_corruption.get_config(variant))
        made.check(8)
        names = ("encoder 1", "encoder 3", "decoder 1")
        assert made.moe_layers == (() if variant == "dense" else names)
    assert encoder_decoder.vocab_size == 2048 + 100
    assert encoder_decoder.tokens_per_step == 8 * (256 + 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.target_length": 57}, "data.target_length=57 is too short.*up to 58"),
        ({"model.encoder_moe.group_size": 48}, "model.encoder_moe.group_size=48.*data.seq_length"),
        ({"model.decoder_moe.group_size": 48}, "model.decoder_moe.group_size=48.*target_length"),
        ({"model.decoder_moe.num_experts": 6, "mesh.expert": 4}, "decoder_moe.num_experts=6"),
        (
            {"training.loss_chunk": 48},
            "training.loss_chunk=48 x mesh.sequence=1 does not divide data.target_length",
        ),
        ({"data.spans.sentinels": 5}, "sentinels=5; raise it"),
        ({"data.spans.noise_density": 0.0}, "noise_density=0.0 must be above 0 and below 1"),
    ],
)
def test_encoder_decoders_are_checked_before_anything_starts(changes, message):
    config = span_corruption.get_config()
    with config.unlocked():
        for name, value in changes.items():
            config.update_from_flattened_dict({name: value})
    with pytest.raises((ConfigError, ValueError), match=message):
        build(Experiment, config).check(8)


@pytest.mark.parametrize("variant", quickstart.VARIANTS)
def test_masked_language_variants_build_and_pass_the_checks(variant):
    made = build(Experiment, masked_language.get_config(variant))
    made.check(1)
    assert made.vocab_size == made.data.vocab_size + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.causal": True}, r"data\.mask_rate=0\.15 .*set model\.causal=False"),
        ({"data.mask_rate": 0.0}, r"model\.causal=False reads the next token"),
    ],
)
def test_masks_need_a_model_that_reads_in_both_directions(changes, message):
    config = masked_language.get_config()
    override(Experiment, config, changes)
    with pytest.raises(ConfigError, match=message):
        build(Experiment, config).check(1)


def test_an_encoder_decoder_has_no_masks(encoder_decoder):
    data = dataclasses.replace(encoder_decoder.data, mask_rate=0.15)
    with pytest.raises(ConfigError, match=r"unset data\.mask_rate"):
        dataclasses.replace(encoder_decoder, data=data).check(1)
