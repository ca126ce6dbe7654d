"""Experts in a latent space on a mesh: the exchange carries the narrow rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moe_jax import routing
from moe_jax.config.experiment import Experiment
from moe_jax.data import DataConfig
from moe_jax.models import DecoderConfig
from moe_jax.nn.feed_forward import FeedForwardConfig
from moe_jax.nn.mode import TRAIN
from moe_jax.nn.moe import ConfiguredMoE
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.shared import SharedConfig
from moe_jax.parallel import MeshConfig, make_mesh, shardings_of_state
from moe_jax.planning.collectives import of_compiled, summary
from moe_jax.planning.compile import make_step
from moe_jax.planning.expected import expected_collectives
from moe_jax.planning.roofline import work

WIDTH, LATENT = 16, 4
# Transport, exchange, and the collective that carries the rows on CPUs.
WAYS = [
    ("gather", "gspmd", "all-to-all"),
    ("einsum", "all_to_all", "all-to-all"),
    ("gather", "ring", "collective-permute"),
    ("ragged", "ragged", "all-to-all"),
]
X = jax.random.normal(jax.random.key(1), (32, 16, WIDTH))
VALID = jnp.arange(512).reshape(32, 16) % 7 > 0


def layer(latent_dim: int, transport: str, exchange: str) -> ConfiguredMoE:
    config = MoEConfig(
        num_experts=8,
        expert_dim=32,
        latent_dim=latent_dim,
        group_size=32,
        router=routing.preset("deepseek_v3", k=2, groups=1, keep_groups=1),
        transport=transport,
        exchange=exchange,
        shared=SharedConfig(8),
    )
    return ConfiguredMoE(config, FeedForwardConfig(WIDTH, 32, "relu2"), jax.random.key(0))


def value_and_gradients(moe, x, valid):
    def objective(moe, x):
        y, aux = moe(x, valid, mode=TRAIN)
        return jnp.sin(y).sum() + aux.loss, y

    return jax.value_and_grad(objective, (0, 1), has_aux=True)(moe, x)


def compiled(moe, mesh):
    """Returns the compiled value and gradients, and its arguments on the mesh."""
    moe = jax.device_put(moe, shardings_of_state(moe, mesh))
    groups = PartitionSpec(("data", "fsdp", "expert", "sequence"))
    x, valid = (jax.device_put(a, jax.NamedSharding(mesh, groups)) for a in (X, VALID))
    with jax.set_mesh(mesh):
        return jax.jit(value_and_gradients).lower(moe, x, valid).compile(), (moe, x, valid)


@functools.cache
def alone():
    return jax.jit(value_and_gradients)(layer(LATENT, "gather", "gspmd"), X, VALID)


def assert_as_alone(results):
    """Asserts the values and the gradients of one device."""
    found, wanted = jax.tree.leaves(results), jax.tree.leaves(alone())
    for leaf, other in zip(found, wanted, strict=True):
        bound = 2e-5 * max(float(jnp.abs(other).max()), 1e-6)
        np.testing.assert_allclose(np.asarray(leaf), np.asarray(other), rtol=0, atol=bound)


def rows(program, mesh, kind: str) -> dict[str, int]:
    """Returns count and bytes of the collectives of a kind over the experts."""
    found = [
        line
        for line in summary(of_compiled(program, mesh))
        if line["kind"] == kind and line["axes"] == ["expert"]
    ]
    return {key: sum(line[key] for line in found) for key in ("count", "bytes")}


@pytest.mark.parametrize(("transport", "exchange", "kind"), WAYS, ids=str)
def test_the_exchange_sends_narrow_rows_and_nothing_else_is_sent(transport, exchange, kind):
    mesh = make_mesh(MeshConfig(4, 2))
    narrow, arguments = compiled(layer(LATENT, transport, exchange), mesh)
    wide, _ = compiled(layer(0, transport, exchange), mesh)
    sent, before = (rows(program, mesh, kind) for program in (narrow, wide))
    assert sent["count"] == before["count"] > 0
    assert sent["bytes"] * WIDTH == before["bytes"] * LATENT
    others = [
        {line["kind"] for line in summary(of_compiled(program, mesh))} for program in (narrow, wide)
    ]
    assert others[0] == others[1]
    assert_as_alone(narrow(*arguments))


@pytest.mark.parametrize("sizes", [(1, 2, 2, 2), (2, 2, 1, 1, 2), (2, 2, 2)], ids=str)
@pytest.mark.parametrize(("transport", "exchange"), [way[:2] for way in WAYS], ids=str)
def test_every_axis_of_the_mesh_gives_the_same(transport, exchange, sizes):
    program, arguments = compiled(layer(LATENT, transport, exchange), make_mesh(MeshConfig(*sizes)))
    assert_as_alone(program(*arguments))


def test_the_projections_are_split_over_fsdp_by_the_width_of_tokens():
    mesh = make_mesh(MeshConfig(1, 2, 2, 2))
    moe = layer(LATENT, "gather", "gspmd")
    found = shardings_of_state(moe, mesh).latent
    assert found.down.get_value().spec == PartitionSpec("fsdp", None)
    assert found.up.get_value().spec == PartitionSpec(None, "fsdp")


def experiment(latent_dim: int, **mesh: int) -> Experiment:
    """Two scanned layers that are recomputed in the backward pass."""
    moe = dataclasses.replace(layer(latent_dim, "gather", "gspmd").config, group_size=64)
    sizes = {"num_layers": 2, "num_heads": 2, "head_dim": 8, "mlp_dim": 32, "scan_layers": True}
    model = DecoderConfig(width=WIDTH, **sizes, activation="relu2", remat="full", moe=moe)
    data = DataConfig(source="mixture", tokenizer="bytes", seq_length=64, batch_size=8)
    return Experiment("tiny", model, data, mesh=MeshConfig(**mesh))


def test_plans_foresee_the_rows_that_a_step_sends():
    one = experiment(LATENT, data=4, expert=2)
    step = make_step(one, make_mesh(one.mesh))
    with jax.set_mesh(step.mesh):
        program = step.function.lower(step.state, step.batch).compile()
    (found,) = (
        line
        for line in summary(of_compiled(program, step.mesh))
        if (line["kind"], line["axes"]) == ("all-to-all", ["expert"])
    )
    formula = [each for each in expected_collectives(one, step) if each.kind == "all-to-all"]
    (foreseen,) = summary(formula)
    assert foreseen["bytes"] == found["bytes"] and foreseen["executed"] == found["executed"]


def test_plans_count_narrow_sums_over_the_model_axis_and_narrow_dispatch():
    found = {}
    for latent_dim in (LATENT, WIDTH):
        one = experiment(latent_dim, data=2, expert=2, model=2)
        step = make_step(one, make_mesh(one.mesh))
        sums = expected_collectives(one, step)
        by_einsum = dataclasses.replace(one.model.moe, transport="einsum")
        model = dataclasses.replace(one.model, moe=by_einsum)
        found[latent_dim] = (
            sum(each.total_bytes for each in sums if each.shape == "experts"),
            work(dataclasses.replace(one, model=model)).transport,
        )
    narrow, wide = found[LATENT], found[WIDTH]
    assert (4 * narrow[0], 4 * narrow[1]) == wide and narrow[0] > 0
