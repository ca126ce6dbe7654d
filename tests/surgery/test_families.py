"""Every change on a folder of every family of ``transformers``: it is written and loads again."""

import numpy as np
import pytest

from moe_jax.errors import ConfigError
from moe_jax.interop import folders, native
from moe_jax.interop.huggingface import load
from moe_jax.surgery.api import grow, merge, prune
from moe_jax.surgery.mixture import mixtures
from moe_jax.surgery.quantising import quantise
from moe_jax.surgery.weights import LayerWeights
from tests.parity.compare_models import MIXTURES, recorded
from tests.surgery.test_api import add_tokenizer, files_of


@pytest.fixture(params=MIXTURES)
def source(request, tmp_path):
    """A small released model with a tokenizer, beside a text."""
    folder = tmp_path / "hf"
    folder.mkdir()
    recorded(request.param, folder)
    add_tokenizer(folder)
    (tmp_path / "text.txt").write_text("experts and routers of a mixture " * 8)
    return folder


def weights_of(folder):
    found = native.load(folder) if folders.kind_of(folder) == "moe_jax" else load(folder)
    return LayerWeights.of_model(found.model)


def fewer(weights):
    """The largest smaller number of experts that all routers accept."""
    layers = mixtures(weights).values()
    for experts in range(min(m.num_experts for m in layers) - 1, 0, -1):
        try:
            for mixture in layers:
                mixture.with_settings(num_experts=experts)
        except ConfigError:
            continue
        return experts
    raise AssertionError("no router works with fewer experts")


def test_a_model_is_pruned_merged_grown_and_quantised(source, tmp_path):
    text, before, files = str(tmp_path / "text.txt"), weights_of(source), files_of(source)
    experts = fewer(before)
    prune(source, tmp_path / "pruned", experts=experts, by="output", file=text, batches=1)
    merge(source, tmp_path / "merged", experts=experts, file=text, batches=1)
    grow(source, tmp_path / "wider", hidden=_hidden(before) + 2)
    quantise(source, tmp_path / "int8", bits="int8", calibration=text, batches=1)
    assert files_of(source) == files
    for name in ("pruned", "merged"):
        sizes = {m.num_experts for m in mixtures(weights_of(tmp_path / name)).values()}
        assert sizes == {experts}, name
    assert weights_of(tmp_path / "wider").size > before.size
    small = weights_of(tmp_path / "int8")
    assert small.arrays.keys() == before.arrays.keys()
    for name, array in before.arrays.items():
        error = np.abs(np.asarray(array) - np.asarray(small.arrays[name])).max()
        assert error <= 0.1 * np.abs(array).max(), name


def _hidden(weights):
    return max(m.moe.expert_dim for m in mixtures(weights).values())
