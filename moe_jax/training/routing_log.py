"""Recorded routing: the choices of all tokens in every step of a run, to replay in another run."""

from __future__ import annotations

import dataclasses
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.errors import ConfigError, line_of
from moe_jax.files import replaced
from moe_jax.training.history import spans

ROUTING = "routing"


@dataclasses.dataclass(frozen=True)
class RoutingRecord:
    """Files, one per step, with the choices of each MoE layer and a checksum of the tokens.

    Attributes:
        folder: Folder of the files.
    """

    folder: Path

    def write(
        self, step: int, batch: Mapping[str, np.ndarray], choices: Sequence[np.ndarray]
    ) -> None:
        """Writes the choices ``(B, L, K)`` of every MoE layer in ``step``.

        Raises:
            WriteError: If the file cannot be written.
        """
        layers: dict[str, Any] = {
            f"layer{i:04d}": _compact(np.asarray(c)) for i, c in enumerate(choices)
        }
        with replaced(self._path(step)) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, tokens=_checksum(batch), **layers)

    def missing(self, steps: int) -> list[int]:
        """Returns the steps among the first ``steps`` without an intact file."""
        return [step for step in range(1, steps + 1) if not zipfile.is_zipfile(self._path(step))]

    def read(self, step: int, batch: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        """Returns the int32 choices of ``step``, one array per MoE layer.

        Raises:
            ConfigError: If the step was not recorded, or was recorded for other tokens.
        """
        path = self._path(step)
        if not path.exists():
            raise ConfigError(
                f"step {step} was not recorded in {self.folder}: lower training.steps or record "
                "with training.record_routing=True"
            )
        arrays = _arrays(path)
        if arrays.pop("tokens") != _checksum(batch):
            raise ConfigError(
                f"{path} was recorded for other tokens: use the data settings, batch size and "
                "seed of the recorded run"
            )
        return _layers(arrays)

    def passes(self) -> Iterator[tuple[np.ndarray, ...]]:
        """Yields the int32 choices ``(B, L, K)`` of every step, one array per MoE layer.

        Raises:
            ConfigError: If the folder holds no steps, or a file is damaged.
        """
        paths = sorted(self.folder.glob("*.npz"))
        if not paths:
            raise ConfigError(
                f"{self.folder} holds no recorded routing: train with training.record_routing=True"
            )
        for path in paths:
            yield _layers(_arrays(path))

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:08d}.npz"


def check_replay(folder: str, steps: int, layers: Sequence[tuple[int, int]]) -> None:
    """Rejects a folder that does not hold the routing of every step of a run.

    Args:
        folder: Value of ``training.replay_routing``; "" for no replay.
        steps: Number of steps of the run.
        layers: Number of choices per token and of experts of each MoE layer.

    Raises:
        ConfigError: If a step has no record, or if the record of the first step has other layers,
            choices or experts than the run.
    """
    if not folder:
        return
    record = RoutingRecord(Path(folder))
    missing = record.missing(steps)
    if missing:
        raise ConfigError(
            f"training.replay_routing={folder} lacks the routing of {spans(missing)}, or it is "
            f"damaged: lower training.steps={steps}, or record a run with "
            "training.record_routing=True"
        )
    _check_layers(folder, next(record.passes()), layers)


def _check_layers(
    folder: str, recorded: Sequence[np.ndarray], layers: Sequence[tuple[int, int]]
) -> None:
    """Rejects the choices ``(B, L, K)`` of each MoE layer of another model."""
    found = f"training.replay_routing={folder} has the routing of another model"
    if len(recorded) != len(layers):
        raise ConfigError(f"{found}: of {len(recorded)} MoE layers, and this one has {len(layers)}")
    for number, (chosen, (choices, experts)) in enumerate(zip(recorded, layers, strict=True)):
        if chosen.shape[-1] != choices:
            raise ConfigError(
                f"{found}: MoE layer {number} has {chosen.shape[-1]} choices per token and here "
                f"{choices}; set the router's k to {chosen.shape[-1]}"
            )
        # A dropped choice of an expert is recorded as -1 - expert.
        largest = int(np.maximum(chosen, -1 - chosen).max(initial=0))
        if largest >= experts:
            raise ConfigError(
                f"{found}: MoE layer {number} chooses expert {largest} and has {experts} experts "
                "here"
            )


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in ("tokens", *file.files)}
    except (zipfile.BadZipFile, zlib.error, ValueError, KeyError, EOFError, OSError) as error:
        raise ConfigError(
            f"{path} is damaged ({line_of(error)}): restore it from a backup, or record its run "
            "anew"
        ) from error


def _layers(arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """Returns the choices of each MoE layer, of the arrays of a file."""
    return tuple(arrays[name].astype(np.int32) for name in sorted(arrays) if name != "tokens")


def _compact(choices: np.ndarray) -> np.ndarray:
    small = choices.size == 0 or (choices.min() >= -128 and choices.max() <= 127)
    return choices.astype(np.int8 if small else np.int16)


def _checksum(batch: Mapping[str, np.ndarray]) -> np.uint32:
    return np.uint32(zlib.crc32(np.ascontiguousarray(batch["inputs"]).tobytes()))
