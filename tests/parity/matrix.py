"""The table of what is compared with ``transformers``: ``python -m tests.parity.matrix``.

Reads the result of a run: ``pytest tests/parity -m "" --junitxml=FILE``.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict

PROPERTIES = {
    "test_logits_experts_and_greedy_generation": "logits 1e-4, experts, greedy with cache",
    "test_bfloat16": "bfloat16 1e-2",
    "test_an_exported_model_is_the_same_there": "exported",
    "test_shards_on_a_mesh": "shards, 8-device mesh",
    "test_logits_and_experts": "recorded: logits, experts",
    "test_greedy_generation": "recorded: greedy",
    "test_export": "recorded: tensors back",
}


def table(path: str) -> str:
    """Returns Markdown from a junit file: passed tests over all, by case and property."""
    counts: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        name, _, case_name = case.get("name", "").rstrip("]").partition("[")
        if name in PROPERTIES and "models" in case.get("classname", ""):
            cell = counts[case_name][name]
            cell[0] += not any(child.tag in ("failure", "error", "skipped") for child in case)
            cell[1] += 1
    lines = [
        "| model | " + " | ".join(PROPERTIES.values()) + " |",
        "|" + "---|" * (len(PROPERTIES) + 1),
    ]
    for case_name in sorted(counts):
        cells = [_shown(*counts[case_name][name]) for name in PROPERTIES]
        lines.append(f"| `{case_name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shown(passed: int, total: int) -> str:
    return "–" if not total else "yes" if passed == total else "**no**"


if __name__ == "__main__":
    print(table(sys.argv[1]))
