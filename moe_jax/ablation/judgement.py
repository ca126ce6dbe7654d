"""The gates and the claims of an ablation, judged by its records."""

from __future__ import annotations

import dataclasses

import numpy as np

from moe_jax.ablation.ablation import Ablation, Claim, Gate
from moe_jax.ablation.derived import Records, values_of, with_thresholds
from moe_jax.ablation.verdicts import REPRODUCED, UNTESTABLE, Verdict, judge


def failed_gates(ablation: Ablation, records: Records) -> list[str]:
    """Returns the gates of an ablation that its runs fail, in words.

    A gate without records of its arm is not judged yet.

    Args:
        ablation: Ablation of the records.
        records: Lines of ``results.jsonl`` of all arms, with the metrics of ``with_thresholds``.
    """
    checks = ((gate, _passes(ablation, gate, records)) for gate in ablation.gates)
    return [gate.text for gate, passed in checks if passed is False]


def _passes(ablation: Ablation, gate: Gate | Claim, records: Records) -> bool | None:
    if isinstance(gate, Claim):
        control = judge(gate, records, ablation.registered)
        return None if control is None else control.text.startswith(REPRODUCED)
    lines = [line for line in records if line["arm"] == gate.arm]
    values = list(values_of(lines, gate.metric).values())
    if not lines:
        return None
    return bool(values) and gate.least <= float(np.mean(values)) <= gate.most


def judged(ablation: Ablation, records: Records) -> list[Verdict]:
    """Returns the verdicts on the claims with enough records.

    If a gate fails, every verdict is ``UNTESTABLE``, whatever its interval says.
    """
    lines = with_thresholds(ablation, records)
    found = [judge(claim, lines, ablation.registered) for claim in ablation.claims]
    verdicts = [verdict for verdict in found if verdict is not None]
    failed = failed_gates(ablation, lines)
    if not failed:
        return verdicts
    text = f"{UNTESTABLE}: {failed[0]}"
    return [dataclasses.replace(verdict, text=text) for verdict in verdicts]
