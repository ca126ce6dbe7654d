"""The figures of offloading are those of the rounds, and other tokens are an error."""

import jax

from moe_jax.models import Decoder, DecoderConfig
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.offload import OffloadCounts
from moe_jax.serving import Offload
from tools.offload_speed import WHOLE, Plan, difference, measured, plans_of, table

_MOE = MoEConfig(every=1, num_experts=4, expert_dim=8)
_SMALL = DecoderConfig(num_layers=2, width=16, num_heads=2, head_dim=8, mlp_dim=32, moe=_MOE)


def test_counts_between_two_moments():
    after, before = OffloadCounts(9, 7, 3, 300, 1.5, 4, 3), OffloadCounts(4, 3, 1, 100, 1.0, 1, 1)
    assert difference(after, before) == OffloadCounts(5, 4, 2, 200, 0.5, 3, 2)


def test_every_budget_is_compared_with_lru_and_without_prefetch():
    plans = plans_of(1000)
    assert [(each.name, each.share) for each in plans[:1]] == [(WHOLE, 1.0)]
    assert [each.offload.bytes for each in plans[1::4]] == [1000, 500, 250, 120]
    assert len({each.offload for each in plans[1:]}) == 16


def test_budgets_are_measured_in_turns_and_give_equal_tokens():
    model = Decoder(_SMALL, 32, jax.random.key(0))
    plans = [Plan(WHOLE, 1.0, None), Plan("half", 0.5, Offload(2 * 4 * 2 * 16 * 8 * 4 // 2))]
    whole, half = measured(model, plans, [(3, 4), (5, 6, 7)], tokens=4, rounds=2)
    assert "hit_rate" not in whole and 0 < half["hit_rate"] <= 1
    assert whole["tokens_per_second"] > 0 < half["tokens_per_second"]


def test_the_table_has_a_line_per_plan():
    row = {"name": "LRU, prefetch", "share": 0.25, "tokens_per_second": 41.3, "hit_rate": 0.8}
    row |= {"accuracy": None, "bytes_per_token": 2.5e6, "stall_ms_per_token": 1.25}
    whole = {"name": WHOLE, "share": 1.0, "tokens_per_second": 99.0}
    record = {"rows": [whole, row], "expert_bytes": 4e6, "rounds": 3, "sampled": 8, "quiet": False}
    lines = table(record).splitlines()
    assert lines[2] == "| 100% | all on the device | 99 | – | – | – | – |"
    assert lines[3] == "| 25% | LRU, prefetch | 41 | 0.800 | – | 2.50 | 1.25 |"
    assert lines[-1].endswith("Other programs shared the machine.")
