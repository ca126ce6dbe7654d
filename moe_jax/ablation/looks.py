"""The arms of a registered ablation that need more seeds."""

from __future__ import annotations

from moe_jax.ablation.ablation import Ablation, Claim
from moe_jax.ablation.derived import Records, with_thresholds
from moe_jax.ablation.judgement import failed_gates
from moe_jax.ablation.pairs import UNRESOLVED, agreements
from moe_jax.ablation.verdicts import OPEN, judge


def undecided_arms(ablation: Ablation, records: Records) -> list[str]:
    """Returns the arms of open claims, controls and pairs, in the order of the ablation.

    If a gate other than a control has failed, more seeds decide nothing, and no arm is returned.

    Args:
        ablation: Registered ablation of the records.
        records: Lines of ``results.jsonl`` at the last look.
    """
    lines = with_thresholds(ablation, records)
    controls = [gate for gate in ablation.gates if isinstance(gate, Claim)]
    if set(failed_gates(ablation, lines)) - {control.text for control in controls}:
        return []
    verdicts = [judge(claim, lines, ablation.registered) for claim in (*ablation.claims, *controls)]
    contrasts = [
        (verdict.claim.low, verdict.claim.high)
        for verdict in verdicts
        if verdict is not None and verdict.text == OPEN
    ]
    contrasts += [
        (pair.low, pair.high)
        for table in agreements(ablation, lines)
        for pair, reading in table.readings.items()
        if reading == UNRESOLVED
    ]
    undecided = {arm for contrast in contrasts for arm in contrast}
    return [arm for arm in ablation.arms if arm in undecided]
