import pytest

from moe_jax.planning.collectives import Collective
from moe_jax.planning.links import wires
from moe_jax.planning.topology import parse

GIGA = 1e9


def seconds(topology, sizes, kind, axes, sent=GIGA, times=1):
    devices = 1
    for axis in axes:
        devices *= sizes[axis]
    one = Collective(kind, axes, devices, "", int(sent), times)
    return wires(parse(topology), sizes).seconds(one)


def test_a_ring_uses_both_directions_and_a_line_one():
    # v5p: 100 GB/s a link and direction; a side of 4 is a ring, one of 2 is not.
    ring = seconds("v5p:4x4x4", {"data": 16, "expert": 4}, "all-gather", ("expert",))
    assert ring == pytest.approx(1 / 200)
    line = seconds("v5p:2x2x2", {"data": 4, "expert": 2}, "all-gather", ("expert",))
    assert line == pytest.approx(1 / 100)


def test_two_sides_are_twice_as_wide():
    both = seconds("v5p:4x4x4", {"data": 4, "expert": 16}, "all-reduce", ("expert",))
    assert both == pytest.approx(1 / 400)


def test_groups_that_interleave_share_the_links():
    # Every other chip of a side of 8.
    sizes = {"data": 64, "expert": 4, "model": 2}
    apart = seconds("v5p:8x8x8", sizes, "all-gather", ("expert",))
    assert apart == pytest.approx(1 / (2 * 100 * 4 / 7))


def test_an_all_to_all_crosses_the_middle():
    # n / 8 of what a device sends, over one link, on a ring of n.
    found = seconds("v5e:16x16", {"data": 16, "expert": 16}, "all-to-all", ("expert",), times=3)
    assert found == pytest.approx(3 * 16 / 8 / 50)
    # A side of 8 of a 2D slice is a line.
    line = seconds("v5e:8x8", {"data": 8, "expert": 8}, "all-to-all", ("expert",))
    assert line == pytest.approx(8 / 4 / 50)


def test_gpus_within_and_beyond_their_domain():
    sizes = {"data": 8, "expert": 8}
    assert seconds("h100:64", sizes, "all-to-all", ("expert",)) == pytest.approx(1 / 450)
    # One member of a group in each domain: its own adapter alone.
    assert seconds("h100:64", sizes, "all-gather", ("data",)) == pytest.approx(1 / 50)
    # All eight adapters of a domain serve a group that fills it.
    everyone = seconds("h100:64", sizes, "all-reduce", ("data", "expert"))
    assert everyone == pytest.approx(1 / 400)
