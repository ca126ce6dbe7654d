"""What the steps of whole configurations send, against the committed record."""

import json

import jax
import pytest

from moe_jax.parallel import make_mesh
from moe_jax.planning.collectives import summary
from moe_jax.planning.compile import make_step
from moe_jax.planning.expected import expected_collectives
from tests.matrix import sample
from tools.collectives import CASES, PLAIN, RESULT, measure

RECORD = json.loads(RESULT.read_text())


def changes(recorded, now):
    """One line for each entry that differs."""
    found = []
    for what in sorted(recorded.keys() | now.keys()):
        before, after = recorded.get(what), now.get(what)
        if before != after:
            found.append(f"{what}: {before or 'none'} recorded, {after or 'none'} now")
    return found


def test_changes_are_said_by_kind_and_axes():
    one, two = {"count": 1, "bytes": 8}, {"count": 2, "bytes": 16}
    assert changes({"a over data": one, "b": two}, {"a over data": one, "b": two}) == []
    assert changes({"a over data": one}, {"b over expert": two}) == [
        "a over data: {'count': 1, 'bytes': 8} recorded, none now",
        "b over expert: none recorded, {'count': 2, 'bytes': 16} now",
    ]


def test_every_case_is_recorded():
    assert RECORD["cases"].keys() == {case.title for case in CASES}


@pytest.mark.skipif(jax.__version__ != RECORD["jax"], reason=f"recorded with {RECORD['jax']}")
@pytest.mark.parametrize("case", sample(CASES, 2), ids=lambda case: case.title)
def test_a_step_sends_what_is_recorded(case):
    found = changes(RECORD["cases"][case.title], measure(case))
    remedy = "python -m tools.collectives writes the record anew"
    assert not found, "\n".join([case.title, *found, remedy])


EXCHANGED = {
    case.exchange: case
    for case in CASES
    if (case.name, case.variant, case.mesh) == ("quickstart", "switch", PLAIN)
}


@pytest.mark.parametrize("exchange", ["gspmd", "all_to_all", "ring"])
def test_the_formula_of_an_exchange_is_what_is_recorded(exchange):
    # A ring also sends its slot tables by an all-to-all, a thousandth of its bytes.
    case, kind = EXCHANGED[exchange], {"ring": "collective-permute"}.get(exchange, "all-to-all")
    step = make_step(case.experiment, make_mesh(case.mesh))
    formula = [one for one in expected_collectives(case.experiment, step) if one.kind == kind]
    (found,), recorded = summary(formula), RECORD["cases"][case.title][f"{kind} over expert"]
    assert found["axes"] == ["expert"]
    assert (found["executed"], found["bytes"]) == (recorded["executed"], recorded["bytes"])
