"""Groups of a model's arrays, by part and by layer."""

import dataclasses

import pytest

from moe_jax import routing
from moe_jax.config.library import PUBLISHED
from moe_jax.config.loading import experiment_of
from moe_jax.errors import ConfigError
from moe_jax.models import DecoderConfig
from moe_jax.models.groups import leaves_in
from moe_jax.models.parts import groups_of
from moe_jax.models.places import places
from moe_jax.nn.moe_config import MoEConfig
from tests.matrix import sample

ROUTER = routing.preset("loss_free", k=2)
MOE = MoEConfig(every=1, num_experts=4, expert_dim=16, router=ROUTER)
PLAIN = DecoderConfig(num_layers=2, width=16, num_heads=2, head_dim=8, moe=MOE, scan_layers=False)
SCANNED = dataclasses.replace(PLAIN, scan_layers=True)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("params/embedding/table", "embedding"),
        ("params/embedding/head", "head"),
        ("params/final_norm/scale", "norms"),
        ("params/encoder_bias/table", "attention"),
        ("params/layers/3/output_scale", "norms"),
        ("params/layers/3/attention/query_norm", "norms"),
        ("params/layers/3/attention/norm/scale", "norms"),
        ("params/layers/3/attention/sinks", "attention"),
        ("params/decoder/3/cross/query", "attention"),
        ("params/layers/3/attention_experts/experts/query", "experts"),
        ("params/layers/3/feed_forward/router/expert_scale", "router"),
        ("router_state/layers/3/feed_forward/router/state/bias", "router"),
        ("params/layers/3/feed_forward/free/constants", "experts"),
        ("params/layers/3/feed_forward/shared/network/up", "shared"),
        ("params/layers/3/feed_forward/shared/norm/scale", "shared"),
        ("params/layers/3/feed_forward/latent/down", "latent"),
        ("params/layers/3/feed_forward/up", "dense"),
        ("params/lookahead/0/layers/0/feed_forward/experts/up", "experts"),
        ("params/lookahead/0/merge", "lookahead"),
    ],
)
def test_parts(name, part):
    assert groups_of(name)[0] == part


def test_an_array_of_a_layer_is_also_in_its_layer_and_stack():
    found = groups_of("params/decoder/3/cross/query")
    assert found == ("attention", "decoder", "decoder/3", "decoder/3/attention")
    assert groups_of("params/embedding/head") == ("head",)


@pytest.mark.parametrize("config", sample(sorted(p.stem for p in PUBLISHED.glob("[!_]*.py")), 12))
def test_every_array_of_a_published_model_has_a_part(config):
    assert all(groups_of(name) for name in places(experiment_of(config).model))


def test_leaves_of_parts_and_layers():
    layer, router = "params/layers/parts/1/0/feed_forward", "feed_forward/router"
    assert leaves_in(PLAIN, ["router"], "x") == {
        *(f"params/layers/parts/{i}/0/{router}/kernel" for i in (0, 1)),
        *(f"router_state/layers/parts/{i}/0/{router}/state/bias" for i in (0, 1)),
    }
    experts = {f"{layer}/experts/{name}" for name in ("up", "down", "gate")}
    assert leaves_in(PLAIN, ["layers/1/experts"], "x") == experts & leaves_in(
        PLAIN, ["layers/1"], "x"
    )


def test_a_scan_holds_all_layers_or_none():
    # Both layers are entries of one array.
    assert leaves_in(SCANNED, ["layers/0", "layers/1"], "x") == leaves_in(SCANNED, ["layers"], "x")
    with pytest.raises(ConfigError, match="scan_layers=False") as error:
        leaves_in(SCANNED, ["layers/0/router"], "optimizer.frozen")
    assert str(error.value).startswith("optimizer.frozen has params/layers/0/feed_forward/router/")


@pytest.mark.parametrize("group", ["rooter", "layers/2", "layers/0/shared", "params/final_norm"])
def test_an_unknown_group_lists_the_known_ones(group):
    with pytest.raises(ConfigError) as error:
        leaves_in(PLAIN, [group], "optimizer.frozen")
    message = str(error.value)
    assert message.startswith(f"optimizer.frozen has no group {group!r}; ") and "\n" not in message
    assert "attention, embedding, experts, layers, norms, router, layers/0 to layers/1" in message
