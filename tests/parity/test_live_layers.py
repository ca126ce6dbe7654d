"""Whole MoE layers against ``transformers`` itself, where it is installed (``make parity``)."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="torch is not installed: run `make parity`")
pytest.importorskip("transformers", reason="transformers is not installed: run `make parity`")

from tests.parity.compare_layers import LATENTS, assert_layer_parity  # noqa: E402
from tests.parity.layers import nemotron_h  # noqa: E402


@pytest.mark.parametrize(("seed", "tokens"), [(1, 23), (2, 40)])
@pytest.mark.parametrize("latent", LATENTS.values())
def test_the_layer_equals_transformers(latent: int | None, seed: int, tokens: int):
    assert_layer_parity(nemotron_h(latent, seed, tokens))
