"""Against committed records of whole MoE layers, which need neither torch nor ``transformers``."""

from __future__ import annotations

import numpy as np
import pytest

from tests.parity.compare_layers import FIXTURES, LATENTS, assert_layer_parity


@pytest.mark.parametrize("name", LATENTS)
def test_the_layer_equals_the_record(name: str):
    with np.load(FIXTURES / f"{name}.npz", allow_pickle=False) as record:
        assert ("fc1_latent_proj.weight" in record) == (LATENTS[name] is not None)
        assert_layer_parity(dict(record))


def test_every_record_is_compared():
    assert {path.stem for path in FIXTURES.glob("*.npz")} == set(LATENTS)
