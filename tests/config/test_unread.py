import dataclasses

import pytest
from moe_jax.configs import quickstart, span_corruption

from moe_jax.config.experiment import Experiment
from moe_jax.config.loading import experiment_of
from moe_jax.config.optimizer import Adafactor, OptimizerConfig
from moe_jax.config.schema import build
from moe_jax.config.unread import unread
from moe_jax.data import BlendConfig, DataConfig, PartConfig
from moe_jax.data.config import MixtureConfig
from moe_jax.models import AttentionOverride, DecoderConfig, EncoderDecoderConfig
from moe_jax.nn.attention import Details
from moe_jax.nn.latent import Latent
from moe_jax.nn.moe_config import LayerOverride, MoEConfig
from moe_jax.nn.norm import NormConfig
from moe_jax.nn.positions import NoPositions
from moe_jax.nn.shared import SharedConfig
from moe_jax.routing import PRESETS, Capacity, Router, Softmax, TopK, preset


def _changed(value, path, new):
    head, _, rest = path.partition(".")
    new = _changed(getattr(value, head), rest, new) if rest else new
    return dataclasses.replace(value, **{head: new})


@pytest.mark.parametrize("model", [DecoderConfig(), EncoderDecoderConfig()])
def test_defaults_never_warn(model):
    assert unread(Experiment("x", model)) == []


@pytest.mark.parametrize("config", [quickstart, span_corruption], ids=lambda m: m.__name__)
def test_committed_configs_do_not_warn(config):
    for variant in config.VARIANTS:
        assert unread(build(Experiment, config.get_config(variant))) == []


@pytest.mark.parametrize("function", PRESETS, ids=lambda f: f.__name__)
def test_published_routers_do_not_warn(function):
    moe = MoEConfig(num_experts=64, router=function(), allow_future_leak=True)
    assert unread(Experiment("x", DecoderConfig(moe=moe))) == []


_DENSE = {"model.moe": MoEConfig(every=0)}
_DROPLESS = Router(Softmax(), TopK(1), capacity=Capacity(eval_factor=3.0, dropless="always"))
_CASES = [
    ({"training.start_with": "shared"}, "training.start_with='shared'", "training.start_from"),
    ({"training.teacher_weight": 0.5}, "training.teacher_weight=0.5", "training.teacher"),
    ({"training.teacher_temperature": 2.0}, "teacher_temperature=2.0", "training.teacher"),
    ({"training.lookahead_weight": 0.1}, "training.lookahead_weight=0.1", "look ahead"),
    ({"training.eval_every": 2000}, "training.eval_every=2000", "training.steps=1000"),
    ({"training.patience": 3}, "training.patience=3", "training.eval_every is 0"),
    ({"training.keep_best": True}, "training.keep_best=True", "training.eval_every is 0"),
    ({"training.keep_every": 300}, "training.keep_every=300", "checkpoint_every=200"),
    ({"training.teacher": "t", "training.teacher_weight": 0.0}, "training.teacher", "weight is 0"),
    ({**_DENSE, "training.record_routing": True}, "record_routing=True", "no layer has experts"),
    ({**_DENSE, "optimizer.expert_multiplier": 2.0}, "expert_multiplier=2.0", "no layer"),
    ({**_DENSE, "optimizer.decay_routers": False}, "decay_routers=False", "no layer has experts"),
    (
        {"optimizer": OptimizerConfig(Adafactor(), decay_embeddings=False)},
        "optimizer.decay_embeddings=False",
        "no weight decay",
    ),
    ({"optimizer": OptimizerConfig(warmup_steps=1001)}, "warmup_steps=1001", "steps=1000"),
    ({"data.mixture": MixtureConfig(seed=1)}, "data.mixture.seed=1", "is not 'mixture'"),
    ({"data": DataConfig("mixture", text_feature="x")}, "data.text_feature='x'", "'mixture'"),
    ({"data": DataConfig("files:x", train_split="x")}, "data.train_split='x'", "splits of its own"),
    ({"data": DataConfig("lm1b", eval_one_in=9)}, "data.eval_one_in=9", "'lm1b'"),
    (
        {"data": DataConfig(blend=BlendConfig((PartConfig("x"),)))},
        "data.blend.parts",
        "is not 'blend'",
    ),
    (
        {"data": DataConfig("blend", "x", blend=BlendConfig((PartConfig("lm1b"),)))},
        "data.text_feature='x'",
        "each part of data.blend has its own",
    ),
    (
        {"data": DataConfig("blend", blend=BlendConfig((PartConfig("a", weight=1.0),), 2.0))},
        "data.blend.temperature=2.0",
        "the parts have weights",
    ),
    (
        {"data": DataConfig("blend", blend=BlendConfig((PartConfig("lm1b", eval_one_in=9),)))},
        "data.blend.parts['lm1b'].eval_one_in=9",
        "splits of its own",
    ),
    (
        {"data": DataConfig("files:x", eval_source="files:y", eval_one_in=9)},
        "data.eval_one_in=9",
        "data.eval_source is set",
    ),
    (
        {"data": DataConfig("mixture", tokenizer="bytes", data_dir="/d")},
        "data.data_dir='/d'",
        "neither",
    ),
    ({"model.attention": Latent(), "model.head_dim": 8}, "model.head_dim=8", "latent"),
    ({"model.attention_experts.group_size": 8}, "attention_experts.group_size=8", "not set"),
    ({"model.mlp_limit": 7.0}, "model.mlp_limit=7.0", "gated"),
    ({"model.attention": Details(temperature_length=4)}, "temperature_length=4", "temperature"),
    (
        {"model.attention": Details(qk_norm="unit"), "model.positions": NoPositions()},
        "model.attention.qk_norm='unit'",
        "no rotary positions",
    ),
    (
        {
            "model.attention_overrides": (AttentionOverride(layers=(0,), rotary=False),),
            "model.positions": NoPositions(),
        },
        "model.attention_overrides[0].rotary=False",
        "no rotary positions",
    ),
    ({"model.moe": MoEConfig(layers=(1,), every=1)}, "model.moe.every=1", "layers is set"),
    ({"model.moe": MoEConfig(every=0, last=1)}, "model.moe.last=1", "every is 0"),
    (
        {"model.moe": MoEConfig(every=0, overrides=(LayerOverride((1,)),))},
        "model.moe.overrides",
        "every is 0",
    ),
    ({"model.moe": MoEConfig(expert_dim=8, expert_dims=(4, 8))}, "model.moe.expert_dim=8", "dims"),
    ({"model.moe.shared": SharedConfig(mix="sigmoid")}, "shared.mix='sigmoid'", "hidden is 0"),
    ({"model.moe.shared": SharedConfig(norms=True)}, "shared.norms=True", "hidden is 0"),
    (
        {"model.norm": NormConfig(place="output"), "model.moe.router_input": "residual"},
        "model.moe.router_input='residual'",
        "leaves the inputs of layers as they are",
    ),
    (
        {"model.moe.shared": SharedConfig(8, "conditional", gate_target=0.5)},
        "shared.gate_target=0.5",
        "gate_weight is 0",
    ),
    ({"model.moe.router": _DROPLESS}, "model.moe.router.capacity.eval_factor=3.0", "dropless"),
]


@pytest.mark.parametrize(("changes", "setting", "reason"), _CASES)
def test_a_setting_without_effect_is_named_with_the_reason(changes, setting, reason):
    experiment = Experiment("x")
    for path, value in changes.items():
        experiment = _changed(experiment, path, value)
    (line,) = unread(experiment)
    assert line.startswith(setting) or setting in line
    assert reason in line


def test_the_same_setting_is_silent_where_it_is_read():
    experiment = Experiment("x", DecoderConfig(lookahead=1))
    assert unread(_changed(experiment, "training.lookahead_weight", 0.1)) == []
    assert unread(_changed(experiment, "model.moe.router", preset("hash", kind="modulo"))) == []


def test_alarms_on_validations_need_more_than_the_last_one():
    alarms = ({"type": "Drift"}, {"type": "Plateau", "log": "eval"}, {"type": "Overload"})
    found = unread(
        experiment_of("quickstart", {"training.alarms": alarms, "training.eval_every": 0})
    )
    said = [line for line in found if line.startswith("training.alarms")]
    assert [line.split()[1] for line in said] == ["Drift", "Plateau"]
    assert all("training.eval_every is 0" in line for line in said)
    compared = ({"type": "Drift", "reference": "elsewhere"},)
    more = {"training.alarms": compared, "training.eval_every": 0}
    assert not [line for line in unread(experiment_of("quickstart", more)) if "Drift" in line]
