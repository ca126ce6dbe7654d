"""Weights of losses and noise in ``config.json`` reach the router."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.interop.huggingface import FAMILIES
from tests.interop.test_keys import CASE_OF, config_of

COEFFICIENT = "router_aux_loss_coef"
# Families whose loss in transformers counts all choices: balanced, it is K times the coefficient.
ALL_CHOICES = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "gpt_oss",
    "dbrx",
    "nllb-moe",
    "ernie4_5_moe",
    "granitemoe",
)


def with_coefficient(family, value):
    config = config_of(CASE_OF[family])
    if family == "dbrx":
        return config | {"ffn_config": config["ffn_config"] | {"moe_loss_weight": value}}
    return config | {COEFFICIENT: value}


def router_of(family, config):
    found = FAMILIES[family].read(config)
    moe = found.encoder_moe if hasattr(found, "encoder_moe") else found.moe
    return moe.router, moe.num_experts


def router_loss(family, config, logits):
    router, experts = router_of(family, config)
    plan = router(jnp.asarray(logits), capacity=len(logits))
    weight = router.loss_weights.get("balance", 0.0)
    return float(weight * plan.losses["balance"]) if weight else 0.0


def loss_of_transformers(logits, k):
    """``load_balancing_loss_func``: E times the sum of chosen fractions times mean scores."""
    scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.argsort(-scores, axis=-1)[:, :k]
    counts = np.bincount(chosen.ravel(), minlength=logits.shape[1])
    return logits.shape[1] * (counts / len(logits) * scores.mean(0)).sum()


@pytest.mark.parametrize("family", [*ALL_CHOICES, "switch_transformers"])
@pytest.mark.parametrize("coefficient", [0.0, 0.03])
def test_the_balance_loss_is_the_coefficient_times_that_of_transformers(family, coefficient):
    config = with_coefficient(family, coefficient)
    router, experts = router_of(family, config)
    k = 1 if family == "switch_transformers" else router.select.choices(experts)
    logits = np.random.default_rng(0).normal(size=(12, experts)).astype(np.float32)
    wanted = coefficient * loss_of_transformers(logits, k)
    assert router_loss(family, config, logits) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_weight_that_a_file_leaves_out_is_the_default_of_the_family(family):
    config = config_of(CASE_OF[family])
    router, _ = router_of(family, {k: v for k, v in config.items() if k != COEFFICIENT})
    default = FAMILIES[family].keys.read.get(COEFFICIENT)
    if default is not None:
        assert router.loss_weights["balance"] == default.default


def test_deepseek_has_one_loss_where_its_own_file_says_its_weight():
    for family in ("deepseek_v2", "deepseek_v3"):
        config = config_of(CASE_OF[family]) | {"aux_loss_alpha": 0.004}
        assert router_of(family, config)[0].loss_weights == {"balance": 0.004}


def test_the_z_loss_and_the_noise_of_the_inputs():
    switch = config_of(CASE_OF["switch_transformers"])
    switch |= {"router_z_loss_coef": 0.02, "router_jitter_noise": 0.25}
    router, _ = router_of("switch_transformers", switch)
    assert router.loss_weights["z"] == 0.02 and router.input_jitter == 0.25
    mixtral = config_of(CASE_OF["mixtral"]) | {"router_jitter_noise": 0.25}
    assert router_of("mixtral", mixtral)[0].input_jitter == 0.25
    dbrx = json.loads(json.dumps(config_of(CASE_OF["dbrx"])))
    dbrx["ffn_config"]["moe_jitter_eps"] = 0.25
    assert router_of("dbrx", dbrx)[0].input_jitter == 0.25
