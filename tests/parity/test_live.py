"""Against ``transformers`` itself, where it is installed (``make parity``), at other sizes."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="torch is not installed: run `make parity`")
pytest.importorskip("transformers", reason="transformers is not installed: run `make parity`")

from tests.parity.compare import PRESETS, assert_parity  # noqa: E402
from tests.parity.families import FAMILIES  # noqa: E402


@pytest.mark.parametrize(("seed", "tokens"), [(1, 23), (2, 40)])
@pytest.mark.parametrize("family", FAMILIES)
def test_preset_equals_transformers(family: str, seed: int, tokens: int):
    assert_parity(family, FAMILIES[family](seed, tokens))


def test_every_family_has_a_preset():
    assert set(FAMILIES) == set(PRESETS)
