"""Shares of cores and of graphics cards."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from moe_jax.run.shares import MachineShare, graphics_cards


@pytest.mark.parametrize(
    ("places", "cards", "visible"),
    [
        # One run alone sees every card, and a mesh may span them.
        (1, ["0", "1"], [None]),
        # A card each.
        (2, ["0", "1"], ["0", "1"]),
        # Two on each of two cards.
        (4, ["2", "5"], ["2", "5", "2", "5"]),
        # All on the only one.
        (2, ["0"], ["0", "0"]),
        # None to share, as on TPUs.
        (2, [], [None, None]),
    ],
)
def test_runs_share_the_cards(places, cards, visible):
    took = [taken(MachineShare(index, places, cards), "gpu") for index in range(places)]
    assert [each.get("CUDA_VISIBLE_DEVICES") for each in took] == visible
    shared = 0 < len(cards) < places
    assert {each.get("XLA_PYTHON_CLIENT_PREALLOCATE") for each in took} == (
        {"false"} if shared else {None}
    )


def test_runs_at_the_scale_of_cpus_take_no_card():
    assert taken(MachineShare(1, 2, ["0"]), "cpu") == {
        "JAX_PLATFORMS": "cpu",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }


def taken(place: MachineShare, scale: str) -> dict[str, str]:
    """Takes a place in a thread of its own, which alone is bound to cores."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(place.take, scale).result()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no threads")
def test_places_share_all_cores_and_nothing_twice():
    def cores(place: MachineShare) -> set[int]:
        place.take("cpu")
        return os.sched_getaffinity(0)

    with ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(cores, MachineShare(index, 2)).result() for index in (0, 1))
    mine = os.sched_getaffinity(0)
    assert first | second == mine
    assert len(mine) == 1 or not first & second


def test_the_cards_are_those_that_the_user_shows(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-1f")
    assert graphics_cards() == ["3", "GPU-1f"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert graphics_cards() == []


def test_or_all_that_the_driver_lists(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert graphics_cards() == []
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: x)'\necho 'GPU 1: A (UUID: y)'\n")
    tool.chmod(0o755)
    assert graphics_cards() == ["0", "1"]
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert graphics_cards() == []
