"""Every change on a folder of every family of ``transformers``: it is written and loads again."""

import functools

import pytest

from moe_jax.errors import ConfigError
from moe_jax.interop import folders, native
from moe_jax.interop.huggingface import load
from moe_jax.surgery.api import distil, grow, merge, prune
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
    """The largest smaller number of experts that all routers accept, or ``None``."""
    layers = mixtures(weights).values()
    for experts in range(min(m.num_experts for m in layers) - 1, 0, -1):
        try:
            for mixture in layers:
                mixture.with_settings(num_experts=experts)
        except ConfigError:
            continue
        return experts
    return None


def test_a_model_is_pruned_merged_grown_and_quantised(source, tmp_path):
    text, before, files = str(tmp_path / "text.txt"), weights_of(source), files_of(source)
    experts, read = fewer(before), {"file": text, "batches": 1}
    ways = {"pruned": functools.partial(prune, by="output"), "merged": merge}
    for name, change in ways.items():
        if experts is None:  # The groups of this router are as small as they can be.
            with pytest.raises(ConfigError) as error:
                change(source, tmp_path / name, experts=2, **read)
            assert "\n" not in str(error.value) and not (tmp_path / name).exists()
            continue
        change(source, tmp_path / name, experts=experts, **read)
        sizes = {m.num_experts for m in mixtures(weights_of(tmp_path / name)).values()}
        assert sizes == {experts}, name
    hidden = max(m.moe.expert_dim for m in mixtures(before).values()) + 2
    grow(source, tmp_path / "wider", hidden=hidden)
    wider = mixtures(weights_of(tmp_path / "wider")).values()
    assert {m.moe.expert_dim for m in wider} == {hidden}
    small = quantise(source, tmp_path / "int8", bits="int8", calibration=text, batches=1)
    assert 0 < small.difference.logits_error < 0.1
    assert weights_of(tmp_path / "int8").arrays.keys() == before.arrays.keys()
    assert files_of(source) == files


def test_a_dense_student_is_written_and_loads_again(source, tmp_path):
    text, before = str(tmp_path / "text.txt"), weights_of(source)
    groups = {"experts": 2, "file": text, "batches": 1, "drop_lookahead": True}
    made = distil(source, tmp_path / "dense", **groups)
    student = weights_of(tmp_path / "dense")
    assert made.experts == {} == mixtures(student)
    widest = max(2 * m.moe.expert_dim + m.moe.shared.hidden for m in mixtures(before).values())
    assert student.model.mlp_dim >= widest
