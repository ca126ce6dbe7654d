"""Every family against committed records of ``transformers``; needs neither it nor torch."""

from __future__ import annotations

import importlib.util

import jax
import pytest

from moe_jax.interop.huggingface import FAMILIES, load
from moe_jax.parallel import MeshConfig, make_mesh
from tests.matrix import sample
from tests.parity import compare_models as compare

# Beside a live comparison of every family some records will do.
LIVE = importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")


@pytest.fixture(scope="module", params=sample(compare.RECORDED) if LIVE else compare.RECORDED)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    record = compare.recorded(request.param, folder)
    return folder, record, load(folder)


def test_logits_and_experts(case):
    _, record, imported = case
    compare.assert_same_function(imported, record)


def test_greedy_generation(case):
    _, record, imported = case
    compare.assert_same_greedy(imported, record)


def test_export(case, tmp_path):
    folder, _, imported = case
    compare.assert_same_tensors_back(imported, folder, tmp_path / "back")


def test_layers_that_differ_are_the_same_on_a_mesh(tmp_path):
    # Gemma 4: heads by layer, keys as values, norms after branches, a router of its own input.
    record = compare.recorded("gemma4", tmp_path)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
    with jax.set_mesh(mesh):
        compare.assert_same_function(load(tmp_path, mesh=mesh), record)


def test_every_family_is_recorded():
    assert {compare.family_of(case) for case in compare.RECORDED} == set(FAMILIES)
