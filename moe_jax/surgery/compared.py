"""Hashes and compares the experts of models in folders, and takes experts from another model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Unpack

from moe_jax.errors import ConfigError
from moe_jax.run.best import Step
from moe_jax.surgery.changed import (
    ChangedModel,
    ChangeOptions,
    Optimizer,
    followed,
    opened_state,
)
from moe_jax.surgery.continued import trees_of
from moe_jax.surgery.mixture import (
    LayerName,
    MixtureLayer,
    check_own_logits,
    mixtures,
    named,
)
from moe_jax.surgery.source import OpenedModel, open_source
from moe_jax.surgery.versions import (
    Taking,
    check_same_experts,
    digest,
    network_of,
    on_host,
    relative_change,
    router_of,
)


@dataclasses.dataclass(frozen=True)
class ExpertVersion:
    """The hashes of one expert; equal hashes mean equal float32 values.

    Attributes:
        layer: Name of the MoE layer.
        expert: Index of the expert.
        network: Hash of the network's parameters.
        router: Hash of the parameters and the state of the router that belong to the expert.

    Examples:
        >>> import moe_jax as mj
        >>> versions = mj.hash_experts("tiny-mixtral")
        >>> isinstance(versions[0], mj.ExpertVersion), len(versions[0].network)
        (True, 16)
    """

    layer: LayerName
    expert: int
    network: str
    router: str


@dataclasses.dataclass(frozen=True)
class ExpertChange:
    """The change of one expert between two models.

    Attributes:
        layer: Name of the MoE layer.
        expert: Index of the expert.
        network: Norm of the change of the network's parameters, divided by their norm before.
        router: The same ratio for the parameters and the state of the router that belong to the
            expert.

    Examples:
        >>> import moe_jax as mj
        >>> changes = mj.diff_experts("tiny-mixtral", "tiny-mixtral")
        >>> isinstance(changes[0], mj.ExpertChange), changes[0].equal
        (True, True)
    """

    layer: LayerName
    expert: int
    network: float
    router: float

    @property
    def equal(self) -> bool:
        """True if no number of the expert changed."""
        return self.network == 0 and self.router == 0


def hash_experts(source: str | Path, *, step: Step = None) -> tuple[ExpertVersion, ...]:
    """Returns the hashes of every expert of every MoE layer.

    Args:
        source: Workdir of a run, or folder of a model.
        step: Step of the checkpoint of a run, or ``best``; ``None`` for the newest intact one.

    Raises:
        ConfigError: If the model has no experts.

    Examples:
        >>> import moe_jax as mj
        >>> versions = mj.hash_experts("tiny-mixtral")
        >>> len(versions) == len({one.network for one in versions}) == 4
        True
    """
    layers = _read(open_source(source, step), source)
    return tuple(
        ExpertVersion(
            name, expert, digest(network_of(mixture, expert)), digest(router_of(mixture, expert))
        )
        for name, mixture in layers.items()
        for expert in range(mixture.num_experts)
    )


def diff_experts(
    source: str | Path, other: str | Path, *, step: Step = None, other_step: Step = None
) -> tuple[ExpertChange, ...]:
    """Returns the change of every expert from one model to another.

    Args:
        source: Workdir of a run, or folder of a model.
        other: Workdir or folder of a model with experts of the same shapes.
        step: Step of the checkpoint of a run, or ``best``; ``None`` for the newest intact one.
        other_step: The same for the other model.

    Raises:
        ConfigError: If a model has no experts, or shapes differ.

    Examples:
        >>> import moe_jax as mj
        >>> len(mj.diff_experts("tiny-mixtral", "tiny-mixtral"))
        4
    """
    before = _read(open_source(source, step), source)
    after = _read(open_source(other, other_step, flag="--other"), other)
    check_same_experts(before, after, str(other))
    return tuple(
        ExpertChange(
            name,
            expert,
            relative_change(network_of(mixture, expert), network_of(after[name], expert)),
            relative_change(router_of(mixture, expert), router_of(after[name], expert)),
        )
        for name, mixture in before.items()
        for expert in range(mixture.num_experts)
    )


def take_experts(
    source: str | Path,
    output: str | Path,
    *,
    other: str | Path,
    experts: Sequence[int],
    layers: Sequence[LayerName] = (),
    router: bool = False,
    other_step: Step = None,
    optimizer: Optimizer = "new",
    **options: Unpack[ChangeOptions],
) -> ChangedModel:
    """Writes a model with some experts of another model, such as an older checkpoint of a run.

    Args:
        source: Workdir of a run, or folder of a model.
        output: Folder to write, empty or missing.
        other: Workdir or folder of a model with experts of the same shapes; ``source`` itself for
            another step of the run.
        experts: Indices of the experts to take.
        layers: Layers whose experts are taken, by index or by name such as ``encoder 1``; an index
            alone means this layer of each stack. Empty for all layers.
        router: True also takes the parameters and the state of the router that belong to them.
        other_step: Step of the checkpoint of the other run, or ``best``.
        optimizer: ``new`` starts a run at step 0; ``keep`` goes on at the step of the checkpoint,
            with the state of the optimizer (see ``moe_jax.surgery.changed.followed``).
            Moments of the taken experts are those of the other run.
        **options: See ``ChangeOptions``.

    Raises:
        ConfigError: If a layer or an expert does not exist, or shapes differ. The error is raised
            before anything is written.

    Examples:
        >>> import moe_jax as mj
        >>> taken = mj.take_experts("tiny-mixtral", "tiny-taken", other="tiny-mixtral", experts=[3])
        >>> all(one.equal for one in mj.diff_experts("tiny-mixtral", "tiny-taken"))
        True
    """

    def decide(opened: OpenedModel) -> Taking:
        here = layers_with_experts(opened, source)
        donor = open_source(other, other_step, flag="--other")
        check_same_experts(here, layers_with_experts(donor, other), str(other))
        donors = {"params": donor.weights}
        if optimizer == "keep":
            state = opened_state(donor, other_step)
            with donor.on_devices():
                donors = trees_of(state.weights, state.leaves)
        return Taking(donors, list(_chosen(here, layers, experts)), experts, router, str(other))

    return followed(source, output, decide, optimizer=optimizer, **options)


def layers_with_experts(opened: OpenedModel, folder: str | Path) -> dict[LayerName, MixtureLayer]:
    """Returns the MoE layers of a model, without modules that look ahead.

    Args:
        opened: The model.
        folder: Folder of the model, for the message.

    Raises:
        ConfigError: If there are none, or several logits share an expert.
    """
    check_own_logits(opened.weights)
    # Modules that look ahead have names of layers too, and hold their experts elsewhere.
    found = {name: one for name, one in mixtures(opened.weights).items() if one.experts}
    if not found:
        raise ConfigError(f"{folder} has no experts: upcycle it first (moe-jax upcycle)")
    return found


def _read(opened: OpenedModel, folder: str | Path) -> dict[LayerName, MixtureLayer]:
    return {name: on_host(mixture) for name, mixture in layers_with_experts(opened, folder).items()}


def _chosen(
    found: Mapping[LayerName, MixtureLayer], layers: Sequence[LayerName], experts: Sequence[int]
) -> dict[LayerName, MixtureLayer]:
    """Returns the layers whose experts are taken.

    Raises:
        ConfigError: If no expert is given, or a layer or an expert does not exist.
    """
    if not experts:
        raise ConfigError("no expert is given: list the experts to take (--experts=3)")
    chosen = named(found, layers or tuple(found))
    for name, mixture in chosen.items():
        for expert in experts:
            if not 0 <= expert < mixture.num_experts:
                last = mixture.num_experts - 1
                raise ConfigError(f"layer {name} has no expert {expert}: it has 0 to {last}")
    return chosen
