"""Continual learning with new experts: the old experts are frozen, and copies of them train."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_jax.config.experiment import Experiment
from moe_jax.errors import ConfigError
from moe_jax.run import workdir
from moe_jax.run.continual import Method
from moe_jax.surgery.api import grow
from moe_jax.surgery.destination import with_model
from moe_jax.surgery.growth import Growth


def with_new_experts(
    copy: Sequence[int],
    *,
    replay: float = 0.0,
    settings: Mapping[str, Any] | None = None,
) -> Method:
    """Returns a method that adds copies of experts, freezes the old experts and trains the rest.

    Args:
        copy: Indices of the experts of which each layer gets one more copy.
        replay: See ``Method``.
        settings: See ``Method``; ``{"optimizer.frozen": ("attention", "embedding", "norms")}``
            trains new experts and routers alone in a model of MoE layers.
    """
    return Method(replay, settings or {}, NewExperts(tuple(copy)))


@dataclasses.dataclass(frozen=True)
class NewExperts:
    """Start of a run with copies of experts beside frozen old experts.

    Attributes:
        copy: Indices of the experts of which each layer gets one more copy.
    """

    copy: tuple[int, ...]

    def experiment(self, first: Experiment, settings: Mapping[str, Any]) -> Experiment:
        """Returns the configuration of the run; see ``moe_jax.run.continual.Begin``."""
        frozen = _frozen(first)
        model = Growth(copy=self.copy).model(dataclasses.replace(first.model, lora=None))
        return with_model(first, model, {**frozen, **settings}, first.vocab_size)

    def write(self, first: Path, folder: Path, settings: Mapping[str, Any]) -> None:
        """Writes the run at step 0; see ``moe_jax.run.continual.Begin``."""
        frozen = _frozen(workdir.load(first))
        grow(first, folder, copy=self.copy, overrides={**frozen, **settings})


def _frozen(first: Experiment) -> dict[str, Any]:
    """Returns the setting that freezes the old experts."""
    numbers = {layer.moe.num_experts for layer in first.model.sparse_layers()}
    if len(numbers) != 1:
        raise ConfigError(
            f"the layers have {sorted(numbers)} experts: new experts need layers of one number"
        )
    return {"optimizer.frozen_experts": numbers.pop()}
