import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax.config.optimizer import SGD, Adafactor, AdamW, Lion, Muon, OptimizerConfig
from moe_jax.models import DecoderConfig
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.parallel import MeshConfig, make_mesh
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import Recipe, from_named_leaves, named_leaves

MOE = MoEConfig(every=2, num_experts=8, expert_dim=32, group_size=16)
MODEL = DecoderConfig(num_layers=2, width=16, num_heads=2, head_dim=8, mlp_dim=32, moe=MOE)
# One layer: what it costs to compile is by layer, and every kind of parameter is in it.
SMALL = DecoderConfig(
    num_layers=1,
    width=16,
    num_heads=2,
    head_dim=8,
    moe=MoEConfig(every=1, num_experts=8, expert_dim=32, group_size=16),
)
EXPERTS = "layers/parts/0/0/feed_forward/experts"


def recipe(model=MODEL, sizes=(1, 1), optimizer=None):
    devices = jax.devices()[: sizes[0] * sizes[1]]
    mesh = make_mesh(MeshConfig(*sizes), devices)
    optimizer = make_optimizer(optimizer or OptimizerConfig(), 20)
    return Recipe(model, 64, optimizer, 0, mesh)


@pytest.fixture(scope="module")
def created():
    """The first state on one device and on two meshes of eight."""
    sizes = ((1, 1), (2, 4), (4, 2))
    return {size: recipe(SMALL, size).create()[1] for size in sizes}


def bits(state):
    return {name: np.asarray(leaf).tobytes() for name, leaf in named_leaves(state).items()}


def test_every_array_has_its_own_readable_name():
    _, state = recipe().abstract()
    names = list(named_leaves(state))
    params = [name.removeprefix("params/") for name in names if name.startswith("params/")]
    norms_and_attention = [
        "attention/key",
        "attention/output",
        "attention/query",
        "attention/value",
        "attention_norm/scale",
    ]
    dense = ["feed_forward/down", "feed_forward/up", "feed_forward_norm/scale"]
    experts = [
        "feed_forward/experts/down",
        "feed_forward/experts/up",
        "feed_forward/router/kernel",
        "feed_forward_norm/scale",
    ]
    assert params == [
        "embedding/table",
        "final_norm/scale",
        *(f"layers/parts/0/0/{name}" for name in norms_and_attention + dense),
        *(f"layers/parts/1/0/{name}" for name in norms_and_attention + experts),
    ]
    moments = [f"opt_state/1/0/{moment}/{name}" for moment in ("mu", "nu") for name in params]
    assert names == [
        "step",
        *(f"params/{name}" for name in params),
        "opt_state/1/0/count",
        *moments,
        "opt_state/3/count",
        "key",
        "skipped",
        "skipped_in_row",
    ]


@pytest.mark.parametrize(
    "rule",
    [AdamW(), Adafactor(factored_from=8), Lion(), SGD(), Muon()],
    ids=lambda r: type(r).__name__,
)
def test_names_there_and_back(rule):
    _, state = recipe(optimizer=OptimizerConfig(rule)).abstract()
    leaves = named_leaves(state)
    assert len(leaves) == len(jax.tree.leaves(state))
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_/") for name in leaves)
    # Each leaf becomes its own name, given in another order, and comes back where it was.
    named = dict(reversed([(name, name) for name in leaves]))
    back = from_named_leaves(state, named)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert named_leaves(back) == named
    assert named_leaves(from_named_leaves(state, leaves)) == leaves


def test_a_missing_name_is_an_error():
    _, state = recipe().abstract()
    leaves = named_leaves(state)
    del leaves["params/embedding/table"]
    with pytest.raises(KeyError, match="params/embedding/table"):
        from_named_leaves(state, leaves)


@pytest.mark.parametrize("sizes", [(2, 4), (4, 2)], ids=str)
def test_the_first_state_does_not_depend_on_the_mesh(created, sizes):
    assert bits(created[sizes]) == bits(created[1, 1])


def test_the_first_state(created):
    leaves = named_leaves(created[1, 1])
    for name in ("step", "skipped", "skipped_in_row", "opt_state/1/0/count", "opt_state/3/count"):
        assert leaves[name].dtype == jnp.int32
        assert int(leaves[name]) == 0, name
    for name, leaf in leaves.items():
        if name.startswith("opt_state"):
            assert not np.asarray(leaf).any(), name
        if name.startswith("params"):
            assert leaf.dtype == jnp.float32
            spread = 0.0 if name.endswith("scale") else 0.05
            assert np.asarray(leaf).std() >= spread, name
    # Experts start different from one another.
    up = np.asarray(leaves[f"params/{EXPERTS}/up"])
    assert len({expert.tobytes() for expert in up}) == 8
    # fold_in(key(seed), 1) is the run's key; fold_in(key(seed), 0) made the parameters.
    wanted = jax.random.key_data(jax.random.fold_in(jax.random.key(0), 1))
    np.testing.assert_array_equal(leaves["key"], wanted)


@pytest.mark.parametrize("sizes", [(2, 4), (4, 2)], ids=str)
def test_experts_live_on_the_expert_axis_and_the_rest_everywhere(created, sizes):
    _, expert_shards = sizes
    for name, leaf in named_leaves(created[sizes]).items():
        if "/experts/" in name:
            # (E, ..., ...)
            assert leaf.sharding.spec == P("expert", "fsdp", "model") or (
                leaf.sharding.spec == P("expert", "model", "fsdp")
            ), name
            shard = (8 // expert_shards, *leaf.shape[1:])
            assert {part.data.shape for part in leaf.addressable_shards} == {shard}
        else:
            assert leaf.sharding.is_fully_replicated, name
        assert len(leaf.addressable_shards) == 8


@pytest.mark.parametrize("sizes", [(1, 1), (2, 4), (4, 2)], ids=str)
def test_abstract_is_what_create_makes(created, sizes):
    _, shapes = recipe(SMALL, sizes).abstract()
    assert jax.tree.structure(shapes) == jax.tree.structure(created[sizes])
    found, wanted = named_leaves(created[sizes]), named_leaves(shapes)
    for name, leaf in wanted.items():
        assert isinstance(leaf, jax.ShapeDtypeStruct)
        assert (found[name].shape, found[name].dtype) == (leaf.shape, leaf.dtype), name
        assert found[name].sharding.is_equivalent_to(leaf.sharding, leaf.ndim), name


def test_the_momentum_of_an_expert_lives_where_the_expert_lives():
    _, state = recipe(sizes=(2, 4), optimizer=OptimizerConfig(Muon())).abstract()
    leaves = named_leaves(state)
    projections = [name for name in leaves if "/projections/" in name and "/mu/" in name]
    assert {name.rsplit("/", 1)[-1] for name in projections} == {
        *("query", "key", "value", "output", "up", "down")
    }
    for name in projections:
        param = leaves[f"params/{name.split('/mu/')[1]}"]
        assert leaves[name].sharding.spec == param.sharding.spec, name
    # AdamW has two moments of each of the others.
    others = [name for name in leaves if "/others/" in name and "/nu/" in name]
    assert {name.rsplit("/", 1)[-1] for name in others} == {"table", "scale", "kernel"}
