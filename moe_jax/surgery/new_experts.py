"""Continual learning with new experts: the old experts are frozen, and copies of them train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_jax.errors import ConfigError
from moe_jax.run import workdir
from moe_jax.run.continual import Method
from moe_jax.surgery.api import grow


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

    def begin(first: Path, folder: Path, given: Mapping[str, Any]) -> None:
        layers = workdir.load(first).model.sparse_layers()
        numbers = {layer.moe.num_experts for layer in layers}
        if len(numbers) != 1:
            raise ConfigError(
                f"the layers have {sorted(numbers)} experts: new experts need layers of one number"
            )
        frozen = {"optimizer.frozen_experts": numbers.pop()}
        grow(first, folder, copy=copy, overrides={**frozen, **given})

    return Method(replay, settings or {}, begin)
