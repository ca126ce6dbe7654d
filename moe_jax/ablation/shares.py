"""Shares of a machine, for runs side by side: cores, and graphics cards."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Sequence

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_ON_DEMAND = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


@dataclasses.dataclass(frozen=True)
class Place:
    """One of several shares of the machine.

    Attributes:
        index: from 0.
        of: how many shares there are.
        cards: graphics cards, as CUDA names them; with fewer cards than shares, shares take turns.
    """

    index: int
    of: int
    cards: Sequence[str] = ()

    def take(self, scale: str) -> dict[str, str]:
        """Binds this thread, and what it starts, to its cores; returns the environment."""
        if self.of > 1 and hasattr(os, "sched_setaffinity"):
            cores = sorted(os.sched_getaffinity(os.getpid()))
            os.sched_setaffinity(0, cores[self.index :: self.of] or cores)
        return {"JAX_PLATFORMS": "cpu"} if scale == "cpu" else self._card()

    def _card(self) -> dict[str, str]:
        if self.of == 1 or not self.cards:
            return {}
        mine = {_VISIBLE: self.cards[self.index % len(self.cards)]}
        # A run that reserves three quarters of a card's memory leaves none for the next.
        return mine | (_ON_DEMAND if self.of > len(self.cards) else {})


def graphics_cards() -> list[str]:
    """Returns the cards that CUDA shows a run: those of CUDA_VISIBLE_DEVICES, or else all."""
    if _VISIBLE in os.environ:
        return [card for card in os.environ[_VISIBLE].split(",") if card]
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    except OSError:
        return []
    return [str(card) for card in range(len(listed.stdout.splitlines()))]
