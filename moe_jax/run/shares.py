"""Shares of a machine for simultaneous runs: cores and graphics cards."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Sequence

_VISIBLE = "CUDA_VISIBLE_DEVICES"
# By default, glibc returns the memory of a step to the system and gets it back page by page.
LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
_ON_DEMAND = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


@dataclasses.dataclass(frozen=True)
class MachineShare:
    """One of several shares of the machine.

    Attributes:
        index: Number of the share, from 0.
        of: Number of shares.
        cards: Graphics cards, as CUDA names them; with fewer cards than shares, several shares use
            one card.
    """

    index: int
    of: int
    cards: Sequence[str] = ()

    def take(self, scale: str) -> dict[str, str]:
        """Binds this thread and its child processes to its cores; returns the environment."""
        if self.of > 1 and hasattr(os, "sched_setaffinity"):
            cores = sorted(os.sched_getaffinity(os.getpid()))
            os.sched_setaffinity(0, cores[self.index :: self.of] or cores)
        return LARGE_PAGES | {"JAX_PLATFORMS": "cpu"} if scale == "cpu" else self._card()

    def _card(self) -> dict[str, str]:
        if self.of == 1 or not self.cards:
            return {}
        visible = {_VISIBLE: self.cards[self.index % len(self.cards)]}
        # By default, a run reserves three quarters of the memory of a card, too much for a second
        # run.
        return visible | (_ON_DEMAND if self.of > len(self.cards) else {})


def graphics_cards() -> list[str]:
    """Returns the graphics cards of ``CUDA_VISIBLE_DEVICES``, or all cards if it is unset."""
    if _VISIBLE in os.environ:
        return [card for card in os.environ[_VISIBLE].split(",") if card]
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    except OSError:
        return []
    if listed.returncode:  # The driver is broken, and its error is on the standard output.
        return []
    return [str(card) for card in range(len(listed.stdout.splitlines()))]


def shares_of(places: int) -> list[MachineShare]:
    """Returns the shares of this machine for a number of simultaneous runs."""
    cards = graphics_cards()
    return [MachineShare(index, places, cards) for index in range(places)]
