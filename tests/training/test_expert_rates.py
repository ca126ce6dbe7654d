"""Updates of experts by their use: by hand, in whole steps, and after a restart."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import models
from moe_jax.config.experiment import Experiment
from moe_jax.config.expert_rates import ExpertRates
from moe_jax.config.optimizer import SGD, OptimizerConfig
from moe_jax.models import EncoderDecoderConfig
from moe_jax.nn.adapted import LoRA
from moe_jax.nn.attention_experts import AttentionExpertsConfig
from moe_jax.nn.moe import ConfiguredMoE
from moe_jax.parallel import MeshConfig, make_mesh
from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.expert_rates import scale_by_use, use_of
from moe_jax.training.optimizer import optimizer_of
from moe_jax.training.state import Recipe, split_model
from moe_jax.training.step import Objective, train_step
from tests.training.test_frozen import MODEL, MOE, batch, values

UP = ("expert", "expert_embed", "expert_mlp")


def one_layer(**arrays):
    """Parameters of a layer with two experts and a router."""
    axes = {"up": UP, "kernel": ("embed", "router")}
    made = {n: nnx.Param(jnp.asarray(x, jnp.float32), axes=axes[n]) for n, x in arrays.items()}
    return nnx.State({"moe": {"experts": {"up": made["up"]}, "router": {"kernel": made["kernel"]}}})


def test_the_mean_use_scales_the_update_by_hand():
    rule = scale_by_use(ExpertRates("linear", decay=0.5))
    ones = one_layer(up=np.ones((2, 1, 2)), kernel=np.ones((3, 2)))
    state = rule.init(ones)
    # The first mean is the first use, 6 and 2 tokens: factors 6 / 4 and 2 / 4.
    updates, state = rule.update(ones, state, use={"moe": jnp.array([6.0, 2.0])})
    up = updates["moe"]["experts"]["up"][...]
    np.testing.assert_allclose(up, [[[1.5, 1.5]], [[0.5, 0.5]]], rtol=1e-6)
    np.testing.assert_array_equal(updates["moe"]["router"]["kernel"][...], np.ones((3, 2)))
    # The second use is 0 and 8. The sums are 3 / 2 + 0 and 1 / 2 + 4, whose ratio to their mean 3
    # is 0.5 and 1.5, so the weight 3 / 4 of both steps cancels.
    updates, state = rule.update(ones, state, use={"moe": jnp.array([0.0, 8.0])})
    np.testing.assert_allclose(state.tokens["moe"], [1.5, 4.5], rtol=1e-6)
    up = updates["moe"]["experts"]["up"][...]
    np.testing.assert_allclose(up[:, 0, 0], [0.5, 1.5], rtol=1e-6)


SHAPES = {
    "scanned": dataclasses.replace(MODEL, num_layers=3, scan_layers=True),
    "widths": dataclasses.replace(MODEL, moe=dataclasses.replace(MOE, expert_dims=(4, 8))),
    "adapters": dataclasses.replace(MODEL, lora=LoRA(2, 4.0, ("experts",))),
    "lookahead": dataclasses.replace(MODEL, lookahead=1),
    "attention": dataclasses.replace(
        MODEL, attention_experts=AttentionExpertsConfig(every=1, num_experts=4, group_size=8)
    ),
    "pair": EncoderDecoderConfig(
        encoder_layers=1, decoder_layers=2, encoder_moe=MOE, decoder_moe=MOE, width=8, num_heads=2
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_expert_of_every_model_has_a_factor(name):
    # Expert e of MoE layer i gets 100 i + e tokens. An update of ones becomes the factors.
    def scaled():
        model = models.make(SHAPES[name], 16, jax.random.key(0))
        moes = [m for _, m in nnx.iter_modules(model) if isinstance(m, ConfiguredMoE)]
        loads = [
            100.0 * i + jnp.arange(layer.moe.num_experts) + 1
            for i, layer in enumerate(SHAPES[name].sparse_layers())
        ]
        use = use_of(model, loads)
        _, params, _ = split_model(model)
        rule = scale_by_use(ExpertRates("linear", decay=0.0))
        ones = jax.tree.map(jnp.ones_like, params)
        updates, state = rule.update(ones, rule.init(params), use=use)
        assert len(use) == len(moes) and state.tokens.keys() == use.keys()
        return updates, use, len(loads)

    updates, use, layers = scaled()
    assert sum(math.prod(tokens.shape[:-1]) for tokens in use.values()) == layers
    for path, update in nnx.to_flat_state(updates):
        value, axes = np.asarray(update.get_value()), update.get_metadata()["axes"]
        if "experts" not in path or axes[0] != "expert":
            np.testing.assert_array_equal(value, 1)
            continue
        at = path.index("experts")
        tokens = np.asarray(use["/".join(map(str, path[:at]))])
        factors = tokens / tokens.mean(-1, keepdims=True)
        if path[at + 1] == "groups":
            factors = np.split(factors, 2)[path[at + 2]]
        entries = value.reshape(*factors.shape, -1)
        np.testing.assert_allclose(
            entries, np.broadcast_to(factors[..., None], entries.shape), 1e-6
        )


RATES = ExpertRates("linear", decay=0.5)
RUN = Experiment(
    "tiny",
    MODEL,
    optimizer=OptimizerConfig(
        SGD(0.0), warmup_steps=0, learning_rate=0.1, clip_norm=0.0, expert_rates=RATES
    ),
)
EXPERTS = "params/layers/parts/0/0/feed_forward/experts/"


@functools.cache
def stepped(rates=RATES, frozen=()):
    """The states and reports of two steps on eight devices, the recipe and the compiled step."""
    optimizer = dataclasses.replace(RUN.optimizer, expert_rates=rates, frozen=frozen)
    run = dataclasses.replace(RUN, optimizer=optimizer)
    made = Recipe(MODEL, 16, optimizer_of(run), 0, make_mesh(MeshConfig(2, 4), jax.devices()[:8]))
    graph, state = made.create()
    step = functools.partial(train_step, graph, made.optimizer, Objective.of(run))
    step = jax.jit(step, compiler_options={"xla_backend_optimization_level": 0})
    states, reports = [state], []
    with jax.set_mesh(made.mesh):
        for number in range(2):
            state, report = step(states[-1], batch(number))
            states.append(state)
            reports.append(report)
    return states, reports, made, step


def test_a_step_of_sgd_moves_each_expert_by_its_share():
    plain, scaled = stepped(None, ("router",)), stepped(RATES, ("router",))
    tokens = np.asarray(scaled[1][0].layers[0].counts.load)
    factors = tokens / tokens.mean()
    assert factors.max() > 1.2
    before = values(plain[0][0])
    once, other = values(plain[0][1]), values(scaled[0][1])
    for name in (f"{EXPERTS}up", f"{EXPERTS}down"):
        moved, expected = other[name] - before[name], once[name] - before[name]
        np.testing.assert_allclose(moved, expected * factors[:, None, None], rtol=1e-3, atol=1e-7)
    np.testing.assert_array_equal(once["params/embedding/table"], other["params/embedding/table"])


def test_a_resumed_run_goes_on_exactly(tmp_path):
    (_, middle, last), _, made, step = stepped()
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(1, middle, {})
        found = checkpoints.restore(made.abstract()[1])
    with jax.set_mesh(made.mesh):
        again, _ = step(found[1], batch(1))
    assert {n: v.tobytes() for n, v in values(again).items()} == {
        n: v.tobytes() for n, v in values(last).items()
    }
    assert any("tokens/" in name for name in values(last))
