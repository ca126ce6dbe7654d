"""Where models store the arrays of each layer."""

import dataclasses

import jax
from flax import nnx
from moe_jax.configs import quickstart

from moe_jax import models
from moe_jax.config.experiment import Experiment
from moe_jax.config.schema import build
from moe_jax.models import DecoderConfig, EncoderDecoderConfig, Stored, stored
from moe_jax.nn.moe_config import MoEConfig

MOE = MoEConfig(every=2, num_experts=4, expert_dim=16, group_size=8)
SIZES = {"width": 16, "num_heads": 2, "head_dim": 8, "mlp_dim": 32}
DECODER = DecoderConfig(num_layers=5, moe=MOE, **SIZES)


def shapes(config):
    return jax.eval_shape(lambda: models.make(config, 8, jax.random.key(0)))


def paths(model):
    return {path for path, _ in nnx.to_flat_state(nnx.state(model))}


def test_layers_of_a_scan_are_entries_of_one_variable():
    # Layers d m d m d: the pattern (d, m) twice, and a dense layer alone.
    found = stored(shapes(DECODER))
    router = ("layers", "parts", 0, 1, "feed_forward", "router", "kernel")
    assert found["layers", 1, "feed_forward", "router", "kernel"] == Stored(router, 0)
    assert found["layers", 3, "feed_forward", "router", "kernel"] == Stored(router, 1)
    last = ("layers", "parts", 1, 0, "feed_forward", "up")
    assert found["layers", 4, "feed_forward", "up"] == Stored(last)
    assert found["embedding", "table"] == Stored(("embedding", "table"))


def test_paths_do_not_depend_on_scanning():
    configs = [
        dataclasses.replace(DECODER, num_layers=4, lookahead=2),
        EncoderDecoderConfig(
            encoder_layers=4, decoder_layers=2, encoder_moe=MOE, decoder_moe=MOE, **SIZES
        ),
    ]
    for config in configs:
        scanned, unrolled = (
            shapes(dataclasses.replace(config, scan_layers=scan)) for scan in (True, False)
        )
        assert stored(scanned).keys() == stored(unrolled).keys()
        # Every variable is there, and outside a scan each is of one layer.
        assert {place.path for place in stored(scanned).values()} == paths(scanned)
        assert {place.path for place in stored(unrolled).values()} == paths(unrolled)
        assert all(place.entry is None for place in stored(unrolled).values())


def test_the_weights_of_the_quickstart_have_the_shapes_of_one_layer():
    model = shapes(build(Experiment, quickstart.get_config("switch")).model)
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    found = {"/".join(map(str, path)): leaf.get_value().shape for path, leaf in flat}
    attention = {
        "attention/key": (128, 4, 32),
        "attention/query": (128, 4, 32),
        "attention/value": (128, 4, 32),
        "attention/output": (4, 32, 128),
        "attention_norm/scale": (128,),
        "feed_forward_norm/scale": (128,),
    }
    dense = {"feed_forward/up": (128, 512), "feed_forward/down": (512, 128)}
    experts = {
        "feed_forward/router/kernel": (128, 8),
        "feed_forward/experts/up": (8, 128, 512),
        "feed_forward/experts/down": (8, 512, 128),
    }
    expected = {"embedding/table": (8, 128), "final_norm/scale": (128,)}
    # Four layers; the second and the fourth have experts.
    for layer, own in enumerate((dense, experts, dense, experts)):
        both = attention | own
        expected |= {f"layers/parts/{layer}/0/{name}": shape for name, shape in both.items()}
    assert found == expected
