"""The figures of drafts are those of the rounds, and drafts change no token."""

import dataclasses

import jax

from moe_jax.models import Decoder, DecoderConfig
from moe_jax.serving import LookaheadModule, NGram, Speculation
from tools.draft_speed import ALONE, Plan, measured, plans_of, table

_SMALL = DecoderConfig(num_layers=1, width=16, num_heads=2, head_dim=8, mlp_dim=32)


def test_every_source_of_drafts_is_compared():
    plans = plans_of(Decoder(_SMALL, 32, jax.random.key(0)))
    assert plans[0] == Plan(ALONE, None)
    kinds = [type(plan.speculation.drafter).__name__ for plan in plans[1:]]
    assert kinds == ["NGram", "DraftModel", "DraftModel", "LookaheadModule"]


def test_sources_are_measured_in_turns_and_give_equal_tokens():
    model = Decoder(dataclasses.replace(_SMALL, lookahead=1), 32, jax.random.key(0))
    plans = [
        Plan(ALONE, None),
        Plan("table", Speculation(NGram(), 2)),
        Plan("own", Speculation(LookaheadModule(), 1)),
    ]
    rows = measured(model, plans, [(3, 4, 3, 4), (5, 6, 7)], tokens=6, rounds=1)
    assert [(row["temperature"], row["name"]) for row in rows] == [
        (temperature, plan.name) for temperature in (0.0, 0.8) for plan in plans
    ]
    alone, _, own = rows[:3]
    assert (alone["acceptance"], alone["tokens_per_step"], alone["speed_up"]) == (None, 1.0, 1.0)
    assert 0 <= own["acceptance"] <= 1 and own["tokens_per_step"] >= 1


def test_the_table_has_a_line_per_temperature_and_source():
    row = {"temperature": 0.8, "name": "table", "tokens_per_second": 41.3, "speed_up": 1.25}
    row |= {"acceptance": 0.5, "tokens_per_step": 1.5}
    alone = row | {"name": ALONE, "acceptance": None, "tokens_per_step": 1.0, "speed_up": 1.0}
    figures = {"rows": [alone, row], "parameters": 4e6, "draft_parameters": 5e5, "rounds": 3}
    lines = table(figures | {"sampled": 8, "quiet": False}).splitlines()
    assert lines[2] == "| 0.8 | no drafts | – | 1.00 | 41 | 1.00 |"
    assert lines[3] == "| 0.8 | table | 0.50 | 1.50 | 41 | 1.25 |"
    assert lines[-1].endswith("Other programs shared the machine.")
