"""Merges low-rank adapters into the weights of a model in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from moe_jax.errors import ConfigError
from moe_jax.surgery.changed import ChangedModel, ChangeOptions, changed
from moe_jax.surgery.source import OpenedModel
from moe_jax.surgery.weights import LayerWeights


def merge_adapters(
    source: str | Path, output: str | Path, **options: Unpack[ChangeOptions]
) -> ChangedModel:
    """Writes a run without adapters, with the weights that an adapted run computes with.

    Every merged weight has the bits of ``W + alpha / rank * A B`` in float32.

    Args:
        source: Workdir of a run with adapters.
        output: Folder to write, empty or missing.
        **options: See ``moe_jax.surgery.changed.ChangeOptions``.

    Raises:
        ConfigError: If the source has no adapters. The error is raised before anything is written.

    Examples:
        >>> import moe_jax as mj
        >>> overrides = {"training.start_from": "runs/tiny", "model.lora.groups": ("experts",)}
        >>> run = mj.open_run("runs/tiny")  # trained in the example of ``train``
        >>> adapted = mj.train(run.config, "runs/adapted", overrides=overrides, say=lambda _: None)
        >>> changed = mj.merge_adapters("runs/adapted", "runs/unadapted")
        >>> changed.kind, changed.difference
        ('run', '')
        >>> mj.open_run("runs/unadapted").evaluate()["loss"] == adapted.evaluate()["loss"]
        True
    """

    def change(opened: OpenedModel) -> tuple[LayerWeights, str]:
        if opened.experiment is None or opened.experiment.model.lora is None:
            raise ConfigError(f"{source} has no adapters: train a run with model.lora first")
        return opened.weights, ""

    return changed(source, output, change, **options)
