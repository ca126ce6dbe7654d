import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from moe_jax.parallel import MeshConfig, make_mesh
from moe_jax.planning.collectives import Collective, collectives, of_compiled, summary

MESH = AbstractMesh((2, 4), ("data", "expert"))


def one(instruction: str, mesh=MESH) -> Collective | None:
    found = collectives("ENTRY %main (x: f32[]) -> f32[] {\n  " + instruction + "\n}\n", mesh)
    return found[0] if found else None


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", ("expert",)),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("data",)),
        ("{{0,1,2,3,4,5,6,7}}", ("data", "expert")),
        ("{}", ("data", "expert")),
        ("[2,4]<=[8]", ("expert",)),
        ("[4,2]<=[2,4]T(1,0)", ("data",)),
        ("[1,8]<=[8]", ("data", "expert")),
        ("mesh['a'=2,'b'=4] {'b'}", ("expert",)),
        ("mesh['a'=2,'b'=1,'c'=4] {'a'}", ("data",)),
        ("@mesh['a'=8] {'a'}", ("data", "expert")),
        # Of the axis of 8, the part of 4 that has a part of 2 before it; and the part before it.
        ("mesh['a'=8] {'a':(2)4}", ("expert",)),
        ("mesh['a'=8] {'a':(1)2}", ("data",)),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ("data",)),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", ("expert",)),
    ],
)
def test_the_axes_of_groups_in_every_notation(groups, axes):
    text = f"%g = f32[8,16]{{1,0}} all-gather(%x), replica_groups={groups}, dimensions={{0}}"
    assert one(text).axes == axes
    assert one(text).devices == {("expert",): 4, ("data",): 2}.get(axes, 8)


def test_groups_of_one_are_none():
    assert one("%g = f32[8] all-gather(%x), replica_groups={{0},{1},{2},{3}}") is None


@pytest.mark.parametrize(
    ("instruction", "kind", "sent", "shape"),
    [
        ("%a = f32[8,16]{1,0} all-gather(%x)", "all-gather", 384, "f32[8,16]"),
        ("%a = f32[8,16]{1,0:T(8,128)} all-reduce(%x)", "all-reduce", 768, "f32[8,16]"),
        ("%a = f32[8,16] reduce-scatter(%x)", "reduce-scatter", 3 * 512, "f32[8,16]"),
        ("%a = bf16[8,16] all-to-all(%x)", "all-to-all", 192, "bf16[8,16]"),
        (
            "%a = (f32[4]{0}, f32[4]{0}, f32[4]{0}, f32[4]{0}) all-to-all(%x, %y, %z, %w)",
            "all-to-all",
            48,
            "f32[4] + f32[4] + f32[4] + f32[4]",
        ),
        ("%a = (f32[2]{0}, f32[8]{0}) all-gather-start(%x)", "all-gather", 24, "f32[8]"),
        ("%a = ((f32[8]), f32[8], u32[]) all-to-all-start(%x)", "all-to-all", 24, "f32[8]"),
        ("%a = (f32[8], f32[4]) all-reduce-start(%x, %y)", "all-reduce", 72, "f32[8] + f32[4]"),
    ],
)
def test_bytes_that_one_device_sends(instruction, kind, sent, shape):
    found = one(f"{instruction}, channel_id=1, replica_groups=[2,4]<=[8]")
    assert (found.kind, found.bytes, found.shape) == (kind, sent, shape)
    assert found.times == 1


def test_an_exchange_of_unequal_parts_sends_the_rows_of_its_smaller_side():
    # Four devices send 8 rows each into buffers of 32, and get 8 rows back.
    text = """ENTRY %main (x: bf16[8,4], b: bf16[32,4]) -> bf16[8,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  %b = bf16[32,4]{1,0} parameter(1)
  %there = bf16[32,4]{1,0} ragged-all-to-all(%x, %b), replica_groups=[2,4]<=[8]
  ROOT %back = bf16[8,4]{1,0} ragged-all-to-all(%there, %x), replica_groups=[2,4]<=[8]
}
"""
    found = [(one.kind, one.bytes, one.shape) for one in collectives(text, MESH)]
    # Three of four rows go to another device.
    assert found == [("ragged-all-to-all", 6 * 4 * 2, "bf16[8,4]")] * 2


def test_permutations_and_ends_of_asynchronous_ones():
    pairs = "source_target_pairs={{0,4},{4,0}}"
    found = one(f"%p = (f32[8], f32[8], u32[], u32[]) collective-permute-start(%x), {pairs}")
    assert (found.kind, found.axes, found.bytes) == ("collective-permute", ("data",), 32)
    assert one("%p = f32[8] collective-permute-done(%x)") is None


LOOP = """HloModule m

%all-reduce-scatter.1 (input: f32[8]) -> f32[2] {
  %input = f32[8]{0} parameter(0)
  %all-reduce.1 = f32[8]{0} all-reduce(%input), channel_id=4, replica_groups=[2,4]<=[8]
  ROOT %slice = f32[2]{0} dynamic-slice(%all-reduce.1), dynamic_slice_sizes={2}
}

%async_collective_fusion (p: f32[2]) -> f32[8] {
  %p = f32[2]{0} parameter(0)
  ROOT %g = f32[8] all-gather(%p), channel_id=9, replica_groups=[2,4]<=[8], CHAIN
}

%async_collective_fusion.2 (p.2: f32[2]) -> f32[8] {
  %p.2 = f32[2]{0} parameter(0)
  ROOT %g.2 = f32[8] all-gather(%p.2), channel_id=9, replica_groups=[2,4]<=[8], CHAIN
}

%cond (c: (s32[], f32[8])) -> pred[] {
  %c = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %n = s32[] constant(6)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (b: (s32[], f32[8])) -> (s32[], f32[8]) {
  %b = (s32[], f32[8]) parameter(0)
  %x = f32[8] get-tuple-element(%b), index=1
  %s = f32[2] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %start = f32[8] fusion(%s), kind=kCustom, calls=%async_collective_fusion
  %next = f32[8] fusion(%s), kind=kCustom, calls=%async_collective_fusion.2
  ROOT %t = (s32[], f32[8]) tuple(%x, %next)
}

ENTRY %main (z: (s32[], f32[8])) -> f32[8] {
  %z = (s32[], f32[8]) parameter(0)
  %w = (s32[], f32[8]) while(%z), condition=%cond, body=%body
  ROOT %r = f32[8] all-to-all(%w), channel_id=2, replica_groups=[4,2]<=[2,4]T(1,0)
}
"""


def test_scanned_layers_fused_steps_and_reduce_scatters_of_tpus():
    chain = 'frontend_attributes={chain_id="3"}'
    found = collectives(LOOP.replace("CHAIN", chain), MESH)
    assert found == [
        Collective("reduce-scatter", ("expert",), 4, "f32[2]", 24, 6),
        Collective("all-gather", ("expert",), 4, "f32[8]", 24, 6),
        Collective("all-to-all", ("data",), 2, "f32[8]", 16, 1),
    ]
    assert summary(found)[0] == {
        "kind": "all-gather",
        "axes": ["expert"],
        "count": 1,
        "executed": 6,
        "bytes": 144,
    }


def test_what_xla_compiles_on_simulated_devices():
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, expert=4))

    def layer(x, w):
        return jax.lax.all_to_all(x @ w, "expert", 0, 0, tiled=True), None

    def model(x, ws):
        return jax.lax.psum(jax.lax.scan(layer, x, ws)[0].sum(), ("data", "expert"))

    rows, whole = PartitionSpec(("data", "expert")), PartitionSpec()
    mapped = jax.shard_map(model, mesh=mesh, in_specs=(rows, whole), out_specs=whole)
    place = functools.partial(NamedSharding, mesh)
    x = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=place(rows))
    ws = jax.ShapeDtypeStruct((3, 16, 16), jnp.float32, sharding=place(whole))
    found = of_compiled(jax.jit(mapped).lower(x, ws).compile(), mesh)
    exchange, total = found
    assert (exchange.kind, exchange.axes, exchange.times) == ("all-to-all", ("expert",), 3)
    assert exchange.bytes == 8 * 16 * 4 * 3 // 4
    assert (total.kind, total.axes, total.times) == ("all-reduce", ("data", "expert"), 1)
