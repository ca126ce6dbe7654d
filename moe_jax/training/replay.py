"""Recorded routing: who chose whom in every step of a run, and its replay in another."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from moe_jax.errors import ConfigError

ROUTING = "routing"


@dataclasses.dataclass(frozen=True)
class RoutingRecord:
    """One file per step: the choices of each MoE layer, and a checksum of the tokens.

    Attributes:
        folder: of the files.
    """

    folder: Path

    def write(
        self, step: int, batch: Mapping[str, np.ndarray], choices: Sequence[np.ndarray]
    ) -> None:
        """Writes the choices ``(B, L, K)`` of every MoE layer in ``step``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        layers = {f"layer{i:04d}": _compact(np.asarray(c)) for i, c in enumerate(choices)}
        path = self._path(step)
        with open(path.with_suffix(".part"), "wb") as file:
            np.savez_compressed(file, tokens=_checksum(batch), **layers)
        path.with_suffix(".part").replace(path)

    def read(self, step: int, batch: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        """Returns the int32 choices of ``step``, one array per MoE layer.

        Raises:
            ConfigError: if the step was not recorded, or for other tokens than those of ``batch``.
        """
        path = self._path(step)
        if not path.exists():
            raise ConfigError(
                f"step {step} was not recorded in {self.folder}: lower training.steps or record "
                "with training.record_routing=True"
            )
        with np.load(path, allow_pickle=False) as file:
            if file["tokens"] != _checksum(batch):
                raise ConfigError(
                    f"{path} was recorded for other tokens: use the data settings, batch size and "
                    "seed of the recorded run"
                )
            names = sorted(name for name in file.files if name != "tokens")
            return tuple(file[name].astype(np.int32) for name in names)

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:08d}.npz"


def _compact(choices: np.ndarray) -> np.ndarray:
    small = choices.size == 0 or (choices.min() >= -128 and choices.max() <= 127)
    return choices.astype(np.int8 if small else np.int16)


def _checksum(batch: Mapping[str, np.ndarray]) -> np.uint32:
    return np.uint32(zlib.crc32(np.ascontiguousarray(batch["inputs"]).tobytes()))
