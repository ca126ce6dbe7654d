"""A run of Weights & Biases with the numbers of ``metrics.jsonl``."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_jax.errors import ConfigError, TrainingError, line_of

_FOLDER, _ID = "wandb", "id.txt"
_PROJECT = "moe_jax"


def check_wandb() -> None:
    """Rejects a machine that cannot write to Weights & Biases, before anything expensive starts.

    Raises:
        ConfigError: If the package is missing, or no account is known and the mode is online.
    """
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "training.writers has 'wandb', which is not installed: pip install 'moe_jax[wandb]'"
        )
    if os.environ.get("WANDB_MODE", "online") == "online" and not _has_account():
        raise ConfigError(
            "training.writers has 'wandb', and this machine has no account: run wandb login, or "
            "set WANDB_MODE=offline"
        )


class WandbRun:
    """A run of Weights & Biases, which resumes with the run in the workdir.

    The environment variables of ``wandb`` apply: ``WANDB_PROJECT`` (``moe_jax`` by default),
    ``WANDB_ENTITY``, and ``WANDB_MODE=offline`` for a run in the workdir alone.
    """

    def __init__(self, workdir: Path):
        """Starts or resumes the run.

        Args:
            workdir: Folder of the run; the files of ``wandb`` are in its folder ``wandb``.

        Raises:
            TrainingError: If ``wandb`` cannot start.
        """
        import wandb

        identity = _identity(workdir)
        _wait_for_a_free_folder(workdir / _FOLDER, identity)
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", _PROJECT),
                id=identity,
                name=workdir.resolve().name,
                dir=str(workdir),
                config=_config(workdir),
                resume="allow",
                settings=wandb.Settings(silent=True, console="off"),
            )
        except Exception as error:
            raise TrainingError(
                f"wandb cannot start ({line_of(error)}): set WANDB_MODE=offline, or take 'wandb' "
                "out of training.writers; then run the same command to go on"
            ) from error
        # After a kill, the steps since the last checkpoint are logged again, with equal numbers.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def add(self, kind: str, step: int, numbers: Mapping[str, float]) -> None:
        """Logs the numbers of one record under names such as ``train/loss``."""
        self._run.log({"step": step, **{f"{kind}/{name}": n for name, n in numbers.items()}})

    def close(self) -> None:
        """Ends the run and waits until its numbers are written."""
        self._run.finish()


def _has_account() -> bool:
    import wandb

    return bool(wandb.login(prompt=False, verify=False))


def _identity(workdir: Path) -> str:
    """Returns the identity of the run, which the first start draws."""
    path = workdir / _FOLDER / _ID
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(8))
    return path.read_text().strip()


def _wait_for_a_free_folder(folder: Path, identity: str) -> None:
    """Waits while ``folder`` has a start of the run in this second.

    ``wandb`` names the folder of a start by its second, and a later start in the same second would
    write over the numbers of the earlier one.
    """
    while any(folder.glob(f"*run-{time.strftime('%Y%m%d_%H%M%S')}-{identity}")):
        time.sleep(0.05)


def _config(workdir: Path) -> dict[str, Any]:
    path = workdir / "config.json"
    return json.loads(path.read_text())["config"] if path.exists() else {}
