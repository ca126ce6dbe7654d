from types import SimpleNamespace

import pytest

from moe_jax.errors import ConfigError
from moe_jax.planning import topology


def test_parsing():
    found = topology.parse("v5p:8x8x16")
    assert (found.num_chips, found.num_devices, found.name) == (1024, 1024, "v5p:8x8x16")
    # One chip of this generation is two devices, each with half of it.
    assert topology.parse("tpu7x:2x2x1").num_devices == 8
    assert topology.parse("tpu7x:2x2x1").chip.device_hbm == 96 * 2**30
    assert topology.parse("h100:64").num_chips == 64


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v5q:4x4x4", "did you mean 'v5p'"),
        ("zzz:4", "a100, b200, cpu, h100, h200, tpu7x, v4, v5e, v5p, v6e"),
        ("v5p", "CHIP:SHAPE"),
        ("v5p:4x0x4", "CHIP:SHAPE"),
        ("v5p:4x4", "3 sides"),
        ("v5e:4x4x4", "2 sides"),
        ("h100:8x8", "a number"),
    ],
)
def test_what_is_refused(text, said):
    with pytest.raises(ConfigError, match=said):
        topology.parse(text)


def test_every_number_has_a_source():
    for chip in topology.CHIPS.values():
        if chip.kind != "cpu":
            assert all("https://" in source for source in chip.sources)
            assert chip.sources
            assert min(chip.flops, chip.hbm, chip.hbm_bandwidth, chip.link_bandwidth) > 0


@pytest.mark.parametrize(
    ("name", "gigabytes"), [("v4", 600), ("v5e", 400), ("v5p", 1200), ("v6e", 800), ("tpu7x", 1200)]
)
def test_links_add_up_to_what_is_printed_of_a_chip_both_ways(name, gigabytes):
    chip = topology.CHIPS[name]
    assert 2 * chip.links * chip.link_bandwidth == gigabytes * 1e9


@pytest.mark.parametrize(("name", "gigabytes"), [("a100", 600), ("h100", 900), ("b200", 1800)])
def test_nvlink_adds_up_to_what_is_printed_of_a_gpu(name, gigabytes):
    chip = topology.CHIPS[name]
    assert 2 * chip.links * chip.link_bandwidth == gigabytes * 1e9


def test_simulated_devices():
    assert len(topology.parse("cpu:4").devices()) == 4
    with pytest.raises(ConfigError, match="a process of its own"):
        topology.parse("cpu:16").devices()
    with pytest.raises(ConfigError, match="analytic"):
        topology.parse("h100:8").devices()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
    ],
)
def test_the_name_of_a_device_tells_its_chip(kind, name):
    assert topology.chip_of(kind) is topology.CHIPS[name]


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100 PCIe", "NVIDIA H200 NVL", "TPU v99", ""])
def test_other_boards_and_unknown_devices_have_no_peak(kind):
    assert topology.chip_of(kind) is None


def test_peaks_add_up_and_one_unknown_device_hides_them():
    h100, cpu = (
        SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3"),
        SimpleNamespace(device_kind="cpu"),
    )
    half = SimpleNamespace(device_kind="TPU7x")
    assert topology.peak_of([h100] * 8) == 8 * 989e12
    assert topology.peak_of([half] * 2) == 2307e12
    assert topology.peak_of([h100, cpu]) == 0
