"""Exports of every family in ``transformers``: fresh, over an older one, and in bfloat16."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: run `make parity`")
pytest.importorskip("transformers", reason="transformers is not installed: run `make parity`")

from safetensors.numpy import load_file  # noqa: E402

from moe_jax.interop.huggingface import FAMILIES, load, save  # noqa: E402
from tests.parity import compare_models as compare  # noqa: E402
from tests.parity import models  # noqa: E402

CASES = {kind: case for case, (kind, _) in reversed(models.CASES.items())}


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    models.make(CASES[request.param], folder)
    return models.record(folder, generate=False), load(folder)


def same(one, other, tolerance):
    return np.abs(one - other).max() <= tolerance * np.abs(other).max()


def test_an_export_has_the_same_logits(case, tmp_path):
    record, imported = case
    save(imported.model, tmp_path, imported.family, original=imported.original)
    assert same(models.record(tmp_path, generate=False)["logits"], record["logits"], 1e-5)


def test_an_export_over_an_older_one_with_more_shards_is_read(case, tmp_path):
    record, imported = case
    out = tmp_path / "out"
    # Its numbers are rounded, so that a stale shard would be seen.
    save(imported.model, out, imported.family, shard_bytes=5_000, dtype="bfloat16")
    assert len(list(out.glob("model-*.safetensors"))) > 2
    save(imported.model, out, imported.family, original=imported.original)
    assert same(models.record(out, generate=False)["logits"], record["logits"], 1e-5)


def test_an_export_in_bfloat16_is_the_rounded_model(case, tmp_path):
    _, imported = case
    save(imported.model, tmp_path, imported.family, original=imported.original, dtype="bfloat16")
    tensors = load_file(tmp_path / "model.safetensors")
    assert sum(tensor.dtype != np.float32 for tensor in tensors.values()) > len(tensors) / 2
    # Both read the rounded weights and compute in float32.
    record = models.record(tmp_path, generate=False)
    logits, _, real = compare.forward(load(tmp_path), record)
    assert same(logits[real], record["logits"][real], 1e-4)
