import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.models import Decoder, DecoderConfig
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.positions import T5Relative
from moe_jax.parallel import MeshConfig, constrain, make_mesh, sharding_of, shardings_of_state
from moe_jax.parallel.rules import spec

P = PartitionSpec
BATCH = ("data", "fsdp", "expert")
DATA = ("data", "fsdp")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("batch", "length", "embed"), P(BATCH, "sequence", "fsdp")),
        (("batch", "length", "vocab"), P(BATCH, "sequence", "model")),
        (("batch", "heads", "length", "head"), P(BATCH, "model", "sequence", None)),
        (("embed", "heads", "head"), P("fsdp", "model", None)),
        (("embed", "mlp"), P("fsdp", "model")),
        (("embed", "router"), P("fsdp", None)),
        (("expert", "expert_embed", "expert_mlp"), P("expert", "fsdp", "model")),
        (("layers", "expert", "expert_mlp", "expert_embed"), P(None, "expert", "model", "fsdp")),
        (("expert", "slots", "expert_mlp"), P("expert", (*DATA, "sequence"), "model")),
        (("group",), P((*BATCH, "sequence"))),
        ((None, "heads"), P(None, "model")),
    ],
)
def test_specs(names, expected):
    assert spec(*names) == expected


def test_an_unknown_name_is_an_error():
    with pytest.raises(KeyError, match="hidden"):
        spec("batch", "hidden")


def test_constrain_without_a_mesh_is_the_identity():
    x = jnp.ones((3, 2))
    assert constrain(x, "batch") is x
    assert "sharding_constraint" not in str(jax.make_jaxpr(lambda x: constrain(x, "batch"))(x))


def test_constrain_with_a_mesh_shards_what_divides():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    cases = [
        ((8, 3, 6), P(BATCH, None, "model")),
        ((4, 3, 6), P(BATCH, None, "model")),
        ((1, 3, 6), P(None, None, "model")),  # one example at inference
        ((8, 3, 5), P(BATCH, None, None)),
    ]
    with jax.set_mesh(mesh):
        for shape, expected in cases:
            x = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
            y = jax.jit(lambda x: constrain(x, "batch", "length", "vocab"))(x)
            assert y.sharding.is_equivalent_to(NamedSharding(mesh, expected), 3)
            np.testing.assert_array_equal(y, x)


def decoder(num_experts: int = 4) -> nnx.State:
    config = DecoderConfig(
        num_layers=5,
        width=8,
        num_heads=2,
        head_dim=4,
        mlp_dim=16,
        gated=True,
        positions=T5Relative(),
        tie_embeddings=False,
        moe=MoEConfig(num_experts=num_experts, expert_dim=16),
    )
    return nnx.eval_shape(lambda: nnx.state(Decoder(config, 32, jax.random.key(0))))


def specs(num_experts: int, mesh: MeshConfig) -> dict[str, PartitionSpec]:
    state = shardings_of_state(decoder(num_experts), make_mesh(mesh))
    flat = nnx.to_flat_state(state)
    return {".".join(map(str, path)): leaf.get_value().spec for path, leaf in flat}


def test_every_parameter_of_a_decoder_has_its_sharding():
    # Layers d m d m d: two scanned repeats of (d, m), stacked along a first axis that stays whole,
    # and an odd dense layer, which has no such axis.
    attention = {
        "query": P(None, "fsdp", "model", None),
        "key": P(None, "fsdp", "model", None),
        "value": P(None, "fsdp", "model", None),
        "output": P(None, "model", None, "fsdp"),
    }
    block = {f"attention.{name}": part for name, part in attention.items()}
    block |= {"attention_norm.scale": P(None, "fsdp"), "feed_forward_norm.scale": P(None, "fsdp")}
    dense = block | {
        "feed_forward.up": P(None, "fsdp", "model"),
        "feed_forward.gate": P(None, "fsdp", "model"),
        "feed_forward.down": P(None, "model", "fsdp"),
    }
    mixture = block | {
        "feed_forward.router.kernel": P(None, "fsdp", None),
        "feed_forward.experts.up": P(None, "expert", "fsdp", "model"),
        "feed_forward.experts.gate": P(None, "expert", "fsdp", "model"),
        "feed_forward.experts.down": P(None, "expert", "model", "fsdp"),
    }
    expected = {
        "embedding.table": P("model", "fsdp"),
        "embedding.head": P("fsdp", "model"),
        "final_norm.scale": P("fsdp"),
        "relative_bias.table": P(None, "model"),
    }
    alone = {name: P(*part[1:]) for name, part in dense.items()}
    for prefix, parts in (("0.0", dense), ("0.1", mixture), ("1.0", alone)):
        expected |= {f"layers.parts.{prefix}.{name}": part for name, part in parts.items()}
    assert specs(4, MeshConfig(2, 2, 2)) == expected


def test_an_axis_that_does_not_divide_is_whole_everywhere():
    found = specs(3, MeshConfig(1, 2, 2, fsdp=2))
    assert found["layers.parts.0.1.feed_forward.experts.up"] == P(None, None, "fsdp", "model")
    assert found["embedding.table"] == P("model", "fsdp")


def test_statistics_with_fewer_axes_than_the_parameter_are_whole():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    variable = nnx.Param(jnp.zeros((4, 8, 8)), axes=("expert", "expert_embed", "expert_mlp"))
    assert sharding_of(variable, (4, 8, 8), mesh).spec == P("expert", "fsdp", "model")
    assert sharding_of(variable, (4, 8), mesh).spec == P()
    assert sharding_of(variable, (3, 4, 8, 8), mesh).spec == P(None, "expert", "fsdp", "model")


def test_what_is_no_variable_is_whole():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    assert shardings_of_state({"step": jnp.int32(0)}, mesh)["step"].spec == P()
