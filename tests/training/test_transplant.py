"""Weights of one model in the place of another's."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from moe_jax.errors import ConfigError
from moe_jax.models import EncoderDecoderConfig
from moe_jax.parallel import MeshConfig, make_mesh
from moe_jax.routing.presets import loss_free
from moe_jax.training.state import named_leaves
from moe_jax.training.transplant import (
    WEIGHTS,
    Transplant,
    WeightPath,
    Weights,
    check_all,
    places,
    shared,
    weight_shapes,
)
from tests.training.test_step import VOCAB, bits, made, model, recipe

SPARSE = dataclasses.replace(model(loss_free(), every=2), num_layers=4)
DENSE = dataclasses.replace(SPARSE, moe=dataclasses.replace(SPARSE.moe, every=0))
UNROLLED = dataclasses.replace(SPARSE, scan_layers=False)


def weights(config):
    """Parameters and routers' state that tell every entry from every other."""
    shapes, found, start = weight_shapes(config, VOCAB).leaves, {}, 0
    for name, like in shapes.items():
        found[name] = start + np.arange(like.size, dtype=like.dtype).reshape(like.shape)
        start += like.size
    return Weights(found, places(config))


def moved(config, source, only_shared, mesh=None):
    """The first state of ``config`` with weights of ``source``, and the one it was drawn as."""
    made_by = recipe(config, mesh, optax.adam(1.0))
    change = Transplant(only_shared, config, SPARSE)
    return made_by.create_from(change, source.leaves), made_by.create()[1]


def apart(weights):
    """Every layer's arrays by name."""
    return {name: np.asarray(weights.take(name)) for name in weights.places}


def of(state, config):
    leaves = {n: x for n, x in named_leaves(state).items() if n.startswith(WEIGHTS)}
    return Weights(leaves, places(config))


def test_layers_have_names_that_do_not_depend_on_scanning():
    shapes = weight_shapes(SPARSE, VOCAB)
    name = "params/layers/parts/0/1/feed_forward/router/kernel"
    assert shapes.leaves[name].shape == (2, 16, 8)
    found = shapes.places
    assert found["params/layers/3/feed_forward/router/kernel"] == WeightPath(name, 1)
    assert found["params/embedding/table"].entry is None
    assert shapes.types == weight_shapes(UNROLLED, VOCAB).types
    first = {n for n in found if n.startswith("params/layers/0/")}
    assert first and {n.replace("/0/", "/2/", 1) for n in first} <= found.keys()
    assert any(n.startswith("router_state/layers/1/") for n in found)


def test_stacks_and_parts_are_told_apart():
    moe = dataclasses.replace(SPARSE.moe, every=0, layers=(1,))
    config = EncoderDecoderConfig(
        encoder_layers=4, decoder_layers=2, width=16, num_heads=2, head_dim=8, mlp_dim=32,
        encoder_moe=moe, decoder_moe=moe,
    )  # fmt: skip
    found = weight_shapes(config, VOCAB).types
    assert found == weight_shapes(dataclasses.replace(config, scan_layers=False), VOCAB).types
    routers = [name for name in found if name.endswith("router/kernel")]
    assert sorted(routers) == [
        f"params/{stack}/1/feed_forward/router/kernel" for stack in ("decoder", "encoder")
    ]


@pytest.mark.parametrize("config", [SPARSE, UNROLLED], ids=["scanned", "unrolled"])
def test_all_weights_move_and_the_optimizer_starts_anew(config):
    source = weights(SPARSE)
    state, drawn = moved(config, source, only_shared=False)
    found, wanted = apart(of(state, config)), apart(source)
    assert found.keys() == wanted.keys()
    assert any("router_state" in name for name in found)
    assert bits(found) == bits(wanted)
    for field in ("opt_state", "key", "step", "skipped"):
        assert bits(getattr(state, field)) == bits(getattr(drawn, field)), field


def test_shared_weights_are_no_experts_and_no_routers():
    source = weights(SPARSE)
    state, drawn = moved(DENSE, source, only_shared=True)
    found, wanted, before = apart(of(state, DENSE)), apart(source), apart(of(drawn, DENSE))
    taken = {name for name in found if found[name].tobytes() != before[name].tobytes()}
    assert taken == shared(of(drawn, DENSE), source)
    for name in found:
        assert bits(found[name]) == bits((wanted if name in taken else before)[name]), name
    kept = found.keys() - taken
    assert kept == {f"params/layers/{i}/feed_forward/{w}" for i in (1, 3) for w in ("up", "down")}


def test_a_larger_mixture_takes_what_is_no_mixture():
    larger = dataclasses.replace(SPARSE, moe=dataclasses.replace(SPARSE.moe, num_experts=16))
    names = shared(weight_shapes(larger, VOCAB), weight_shapes(SPARSE, VOCAB))
    assert names == shared(weight_shapes(SPARSE, VOCAB), weight_shapes(SPARSE, VOCAB))
    assert not any("experts" in name or "router" in name for name in names)


def test_weights_land_in_the_shardings_of_the_mesh():
    mesh = make_mesh(MeshConfig(1, 2, 2, 2))
    state, drawn = moved(SPARSE, weights(SPARSE), only_shared=False, mesh=mesh)
    assert bits(apart(of(state, SPARSE))) == bits(apart(weights(SPARSE)))
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(drawn), strict=True):
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)
    experts = named_leaves(state)["params/layers/parts/0/1/feed_forward/experts/up"]
    assert experts.addressable_shards[0].data.size == experts.size // 8


def test_the_first_difference_is_named():
    _, state = made(recipe(SPARSE))
    here, there = weight_shapes(SPARSE, VOCAB), weight_shapes(DENSE, VOCAB)
    check_all(here, of(state, SPARSE), "x")
    with pytest.raises(ConfigError) as error:
        check_all(here, there, "training.start_from=x")
    assert "training.start_from=x is of another model: params/layers/" in str(error.value)
    assert "is absent there and float32[" in str(error.value)
    assert "start_with=shared" in str(error.value)
