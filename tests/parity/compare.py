"""Our presets on a recorded router's inputs and weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import routing

# The preset of each family, with the choices that its record was made with. Balance losses are
# compared where ``transformers`` has one: over all choices and not divided by their number.
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "olmoe": ("olmoe", {}),
    "gpt_oss": ("gpt_oss", {}),
    "dbrx": ("dbrx", {}),
    "deepseek_v2": ("deepseek_v2", {"devices": 4, "keep_devices": 2}),
    "deepseek_v3": ("deepseek_v3", {"groups": 4, "keep_groups": 2}),
    "nemotron_h": ("deepseek_v3", {"groups": 1, "keep_groups": 1, "scale": 5.0}),
    "llama4": ("llama4", {}),
    "switch_transformers": ("switch", {"z_weight": 1e-3}),
    "nllb_moe": ("fairseq_top2", {"second": "all"}),
    "nllb_moe_prioritized": ("fairseq_top2", {"second": "all", "batch_prioritized": True}),
    "nllb_moe_normalized_first": (
        "fairseq_top2",
        {"second": "all", "normalize_before_dropping": True},
    ),
}


def assert_parity(family: str, record: dict[str, np.ndarray]) -> None:
    """Asserts equal combine weights, equal losses, and the same tokens dropped."""
    name, choices = PRESETS[family]
    if "k" in routing.choices_of(name):
        choices = {**choices, "k": int(record["k"])}
    router = routing.preset(name, **choices)
    tokens, experts = record["weights"].shape
    parameters = {key: jnp.asarray(record[key]) for key in ("kernel", "bias") if key in record}
    logits = router.head.logits(jnp.asarray(record["x"]), parameters, experts)
    capacity = router.slots(tokens, experts, train=False)
    if "capacity" in record and name == "fairseq_top2":
        assert capacity == record["capacity"]
    capacity = int(record.get("capacity", capacity))
    state = {"bias": record["state_bias"]} if "state_bias" in record else None
    plan = jax.jit(lambda logits: router(logits, capacity=capacity, state=state))(logits)

    weights = np.asarray(plan.combine).sum(-1)
    np.testing.assert_array_equal(weights > 0, record["weights"] > 0)
    np.testing.assert_allclose(weights, record["weights"], rtol=2e-5, atol=1e-6)
    seated = np.asarray(plan.dispatch).sum()
    assert seated == (record["weights"] > 0).sum()
    if "loss" in record:
        # OLMoE's own loss is the mean over the choices, of which transformers has the sum.
        choices_counted = int(record["k"]) if family == "olmoe" else 1
        expected = record["loss"] / choices_counted
        np.testing.assert_allclose(plan.losses["balance"], expected, rtol=2e-5)
    if "z" in record:
        np.testing.assert_allclose(plan.losses["z"], record["z"], rtol=2e-5)
