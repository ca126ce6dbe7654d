"""Against committed records of ``transformers``' routers, which need neither it nor torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.parity.compare import PRESETS, assert_parity

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.mark.parametrize("family", PRESETS)
def test_preset_equals_the_record(family: str):
    with np.load(FIXTURES / f"{family}.npz", allow_pickle=False) as record:
        assert_parity(family, dict(record))


@pytest.mark.parametrize("family", [name for name in PRESETS if "nllb" in name or "switch" in name])
def test_records_with_slots_drop_something(family: str):
    with np.load(FIXTURES / f"{family}.npz", allow_pickle=False) as record:
        chosen = (record["weights"] > 0).sum()
        assert chosen < record["weights"].shape[0] * record["k"]


def test_every_record_is_compared():
    assert {path.stem for path in FIXTURES.glob("*.npz")} == set(PRESETS)
