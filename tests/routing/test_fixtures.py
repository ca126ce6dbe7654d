"""The routers against recorded outputs of the code the Switch paper cites (Mesh-TensorFlow).

Where the recordings and their description differ, the recordings decide. They hold the loss before
the factor 1e-2, so a weight here is that of the recording: 1 for the balance, 1e-3 for the z-loss,
0.5 for the second balance. Padding counts in both factors of the Switch loss (see ``LoadBalance``).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe_jax.routing import Router, preset
from tests.routing.helpers import jitted_groups

FOLDER = Path(__file__).resolve().parents[2].parent / "shared" / "fixtures"
LETTERS = {
    "batch": "g",
    "group": "s",
    "expert_unsplit": "e",
    "cap": "c",
    "outer_batch": "o",
    "k": "k",
}
ROUTERS: dict[str, Router] = {
    "switch": preset("switch_mtf", balance_weight=1.0),
    "switch_zloss1e-3": preset("switch_mtf", balance_weight=1.0, z_weight=1e-3),
    "switch_max": preset("switch_mtf", balance_weight=1.0, priority="score"),
    "top2_all": preset("top2_mtf", balance_weight=1.0, second="all"),
    "top2_none": preset("top2_mtf", balance_weight=1.0, second="none"),
    "top2_threshold0.2": preset("top2_mtf", balance_weight=1.0, second="threshold"),
    "top2_secondloss": preset(
        "top2_mtf", balance_weight=1.0, second="all", second_balance_weight=0.5
    ),
    "expert_selection": preset("expert_choice_mtf", balance_weight=1.0),
    "ntlb_top2": preset("no_token_left_behind", balance_weight=1.0, k=2),
}
SIZES = ("S16_E4_C5_pad0", "S16_E4_C5_pad1", "S8_E4_C2_pad0", "S8_E4_C2_pad1")


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"recorded fixtures are not at {FOLDER}")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ROUTERS)
def test_router_reproduces_the_recording(name: str, size: str):
    recorded = np.load(FOLDER / f"{name}_{size}.npz")
    axes = "".join(LETTERS[axis] for axis in recorded["combine_dims"])
    dispatch = np.einsum(f"{axes}->gsec", recorded["dispatch"])
    combine = np.einsum(f"{axes}->gsec", recorded["combine"])
    router, valid = ROUTERS[name], recorded["importance"] > 0
    logits = np.einsum("gsm,me->gse", recorded["x"], recorded["w"])

    plan = jitted_groups(router, dispatch.shape[-1])(logits, valid)

    np.testing.assert_array_equal(plan.dispatch, dispatch)
    np.testing.assert_allclose(plan.combine, combine, rtol=1e-5, atol=1e-6)
    # The balance is a mean over groups, the z-loss a mean over all valid tokens.
    weights, share = router.loss_weights, valid.sum(1) / valid.sum()
    mean = {name: np.mean(value) for name, value in plan.losses.items()}
    if "z" in mean:
        mean["z"] = (plan.losses["z"] * share).sum()
    total = sum(weights[name] * value for name, value in mean.items())
    np.testing.assert_allclose(total, recorded["loss"], rtol=1e-5)


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"recorded fixtures are not at {FOLDER}")
def test_every_recording_is_compared():
    files = {path.stem for path in FOLDER.glob("*.npz")}
    assert files == {f"{name}_{size}" for name in ROUTERS for size in SIZES}
