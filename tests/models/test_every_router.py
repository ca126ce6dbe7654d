"""Every preset, named in a config, makes a model that trains, evaluates and decodes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_jax.configs import common

from moe_jax import routing
from moe_jax.config.schema import build
from moe_jax.counting import count
from moe_jax.models import Decoder, DecoderConfig
from moe_jax.nn.mode import DECODE, EVAL, TRAIN
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.routing import PRESETS

NAMES = [function.__name__ for function in PRESETS]
ROWS, LENGTH, VOCAB = 2, 8, 32


def config(name):
    moe = {"num_experts": 16, "expert_dim": 8, "group_size": 16, "allow_future_leak": True}
    moe["router"] = common.router(name)
    settings = {"num_layers": 2, "width": 8, "num_heads": 2, "head_dim": 4, "mlp_dim": 16}
    return build(DecoderConfig, {**settings, "moe": moe})


@pytest.mark.parametrize("name", NAMES)
def test_a_config_that_names_it_makes_a_model(name):
    made = config(name)
    router = made.moe.router
    assert router == routing.preset(name)
    # Shapes alone: every path is traced, nothing is compiled.
    model = jax.eval_shape(lambda: Decoder(made, VOCAB, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    record = None
    if name == "forced":
        record = [jax.ShapeDtypeStruct((ROWS, LENGTH, 1), jnp.int32)]
    for mode, key in ((TRAIN, jax.random.key(1)), (EVAL, None), (DECODE, None)):

        def run(model, inputs, record, mode=mode, key=key):
            return model.hidden(inputs, inputs, inputs, mode=mode, rng=key, records=record)

        hidden, (report,) = jax.eval_shape(run, model, tokens, record if key is not None else None)
        assert hidden.shape == (ROWS, LENGTH, 8)
        assert report.counts.load.shape == (16,)
        assert set(report.losses) == {part.name for part in router.balance}
    cost = count(made, VOCAB, LENGTH)
    assert 0 < cost.active <= cost.total


def test_a_router_in_the_layers_precision_computes_in_it():
    # Switch table 2: the bfloat16 router. No float32 softmax is left, and outputs stay near.
    layers = {}
    for precision in ("float32", "input"):
        router = routing.preset("switch", precision=precision, input_jitter=0.0)
        moe = MoEConfig(every=1, num_experts=4, expert_dim=8, group_size=16, router=router)
        layers[precision] = DecoderConfig(
            num_layers=1,
            width=8,
            num_heads=2,
            head_dim=4,
            mlp_dim=16,
            moe=moe,
            compute_dtype="bfloat16",
        )
    tokens = jnp.arange(16).reshape(2, 8)
    routed = {}
    for precision, made in layers.items():
        model = Decoder(made, VOCAB, jax.random.key(0))
        run = functools.partial(model.hidden, tokens, jnp.ones_like(tokens), tokens)
        text = str(jax.make_jaxpr(lambda run=run: run(mode=TRAIN))())
        routed[precision] = "bf16[1,16,4] = exp" in text
        _, (report,) = run(mode=TRAIN)
        assert np.isfinite(report.loss) and report.counts.demand.sum() == 16
    assert routed == {"float32": False, "input": True}
