"""What a model costs, by the name of its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_jax import counting
from moe_jax.config.loading import Config, experiment_of
from moe_jax.counting import Cost


def count(config: Config, overrides: Mapping[str, Any] | None = None) -> Cost:
    """Counts the parameters and FLOPs of a model; nothing is allocated.

    Args:
        config: the name of a config, with a variant after a colon (``quickstart:gshard``), a file,
            settings, or an experiment.
        overrides: settings to change, by dotted name.

    Returns:
        ``total`` and ``active`` parameters, ``flops_per_token`` and these numbers by part.

    Raises:
        ConfigError: if there is no such config or setting, or settings do not go together.

    Examples:
        >>> import moe_jax as mj
        >>> cost = mj.count("mixtral_8x7b")
        >>> f"{cost.total:,} parameters, {cost.active:,} for a token"
        '46,702,792,704 parameters, 12,879,925,248 for a token'
        >>> mj.count("mixtral_8x7b", {"model.moe.num_experts": 16}).total > cost.total
        True
    """
    experiment = experiment_of(config, overrides)
    return counting.count(experiment.model, experiment.vocab_size, experiment.sequence)
