"""The validations of a run so far: its lowest loss, and when training stops early.

A checkpoint saves this record, so a resumed run keeps and stops at the same steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Validations:
    """A summary of the validations of a run.

    Attributes:
        last: Step of the last validation; 0 before the first.
        best: Step of the lowest loss; 0 before the first finite loss.
        loss: Lowest loss in nats per token; ``None`` before the first finite loss.
        since: Number of validations since the lowest loss.
    """

    last: int = 0
    best: int = 0
    loss: float | None = None
    since: int = 0

    def __str__(self) -> str:
        """Returns the summary in words."""
        if self.loss is None:
            return f"validations without a finite loss: {self.since}"
        best = f"lowest validation loss {self.loss:.4f} nats at step {self.best}"
        return f"{best}, validations since then: {self.since}"

    def after(self, step: int, loss: float | None) -> Validations:
        """Returns the summary after one more validation; a loss of ``None`` was not finite."""
        lowest = math.inf if self.loss is None else self.loss
        if loss is not None and loss < lowest:
            return Validations(step, step, loss)
        return dataclasses.replace(self, last=step, since=self.since + 1)

    def after_all(self, records: Iterable[Mapping[str, Any]]) -> Validations:
        """Returns the summary after those lines of ``metrics.jsonl`` that are later validations."""
        found = self
        for record in records:
            if record["kind"] == "eval" and record["step"] > found.last:
                found = found.after(record["step"], record["loss"])
        return found

    def exhausted(self, patience: int) -> bool:
        """Returns whether ``patience`` validations had no lower loss; 0 never ends a run."""
        return 0 < patience <= self.since
