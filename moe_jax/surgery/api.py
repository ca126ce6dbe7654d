"""Upcycles, prunes, merges and grows models in folders."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from moe_jax import routing
from moe_jax.errors import ConfigError
from moe_jax.run.best import Step
from moe_jax.surgery import upcycle as dense
from moe_jax.surgery.destination import Kind, check_output, write
from moe_jax.surgery.evidence import LeaveOneOut, use_of
from moe_jax.surgery.grow import Grown, copied, perturbed, split, widened, with_copies
from moe_jax.surgery.merge import cosines, groups_of
from moe_jax.surgery.merge import merge as merged_layer
from moe_jax.surgery.mixture import (
    LayerName,
    MixtureLayer,
    check_changeable,
    mixtures,
    with_mixtures,
)
from moe_jax.surgery.prune import (
    best_of_all_layers,
    best_of_each_layer,
    check_number,
    fewest,
)
from moe_jax.surgery.prune import prune as without_experts
from moe_jax.surgery.source import OpenedModel, open_source
from moe_jax.surgery.weights import LayerWeights

By = Literal["load", "gate", "output", "loss"]
_KINDS = {"run": "run", "hf": "model of transformers", "moe_jax": "converted model"}


@dataclasses.dataclass(frozen=True)
class ChangedModel:
    """A model that was written.

    Attributes:
        folder: Folder of the model.
        kind: Kind of the folder: ``run``, ``hf`` or ``moe_jax`` (converted).
        parameters: Numbers of parameters before and after.
        experts: Number of experts of each layer, by name.
        difference: Reason for which the function differs at the start; "" if it is the same up to
            rounding where no token is dropped.

    Examples:
        >>> import moe_jax as mj
        >>> changed = mj.grow("tiny-mixtral", "tiny-wider", hidden=32)
        >>> before, after = changed.parameters
        >>> after - before == 4 * 3 * 16 * 16  # 16 more units in 4 experts of 3 matrices
        True
    """

    folder: Path
    kind: Kind
    parameters: tuple[int, int]
    experts: Mapping[LayerName, int]
    difference: str

    def __str__(self) -> str:
        before, after = self.parameters
        numbers = sorted(set(self.experts.values()))
        span = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
        function = f"differs: {self.difference}" if self.difference else "is the same"
        anew = "; its optimizer starts anew at step 0" if self.kind == "run" else ""
        return (
            f"{self.folder} is a {_KINDS[self.kind]} of {after:,} parameters (before: {before:,}), "
            f"with {span} experts in {len(self.experts)} layers; the function {function}{anew}"
        )


def upcycle(
    source: str | Path,
    output: str | Path,
    *,
    experts: int = 8,
    k: int = 2,
    shards: int = 1,
    layers: Sequence[int] = (),
    redrawn: float = 0.0,
    router: str = "mixtral",
    seed: int = 0,
    step: Step = None,
    family: str = "",
    overrides: Mapping[str, Any] | None = None,
) -> ChangedModel:
    """Writes a mixture whose experts are copies, or parts of copies, of a dense model's networks.

    Args:
        source: Workdir of a dense run, or folder of a dense model.
        output: Folder to write, empty or missing.
        experts: Number of experts per layer.
        k: Number of experts per token.
        shards: Number of parts of equal width of each network (2410.07524); 1 copies whole ones.
        layers: Indices of the layers that get experts; empty for all layers.
        redrawn: Share of each expert's hidden units that is drawn again (2502.19261).
        router: Name of a router with ``k``.
        seed: Seed of the routers and of the weights that are drawn again.
        step: Step of the checkpoint of a run, or ``best``; ``None`` for the newest intact one.
        family: ``model_type`` of the output, if ``source`` is no run; "" for one that fits.
        overrides: New settings of a run by dotted name, such as ``training.steps``.

    Raises:
        ConfigError: If the model is not dense, or a number does not fit. The error is raised before
            anything is written.

    Examples:
        >>> import moe_jax as mj
        >>> changed = mj.upcycle("tiny-llama", "tiny-upcycled", experts=4)
        >>> changed.kind, changed.experts, changed.difference
        ('hf', {0: 4}, '')
        >>> mj.load_hf("tiny-upcycled").family
        'mixtral'
    """
    recipe = dense.Upcycling(experts, routing.preset(router, k=k), shards, tuple(layers), redrawn)
    same = dense.keeps_function(recipe)
    difference = "" if same else "its gates or weights do not add up to the dense network"
    return _changed(
        source,
        output,
        step,
        lambda opened: (dense.upcycle(opened.weights, recipe, jax.random.key(seed)), difference),
        family,
        overrides,
    )


def prune(
    source: str | Path,
    output: str | Path,
    *,
    experts: int,
    by: By = "load",
    across: bool = False,
    file: str = "",
    batches: int = 8,
    step: Step = None,
    family: str = "",
    overrides: Mapping[str, Any] | None = None,
) -> ChangedModel:
    """Writes a model with fewer experts.

    Args:
        source: Workdir of a run, or folder of a model.
        output: Folder to write, empty or missing.
        experts: Number of experts that a layer keeps; the mean over layers if ``across``.
        by: Score of an expert: its share of the choices (``load``) or of the gates (``gate``), the
            mean of gate times norm of its output (``output``, REAP 2510.13999), or the loss
            without it (``loss``, one expert after the other).
        across: True compares the experts of all layers, False those of each layer.
        file: Text on which the score is measured; "" for the validation set of a run.
        batches: Largest number of batches of the text.
        step: Step of the checkpoint of a run, or ``best``; ``None`` for the newest intact one.
        family: ``model_type`` of the output, if ``source`` is no run; "" for one that fits.
        overrides: New settings of a run by dotted name, such as ``training.steps``.

    Raises:
        ConfigError: If a router needs more experts, or there is no text. The error is raised before
            anything is written.

    Examples:
        >>> import moe_jax as mj
        >>> changed = mj.prune("runs/tiny", "runs/pruned", experts=6)  # trained for ``train``
        >>> changed.kind, changed.experts
        ('run', {0: 6})
        >>> mj.open_run("runs/pruned").generate("abc", tokens=4).startswith("abc")
        True
    """

    def change(opened: OpenedModel) -> tuple[LayerWeights, str]:
        kept = _kept(opened, experts, by, across, file, batches)
        return without_experts(opened.weights, kept), "experts are left out"

    return _changed(source, output, step, change, family, overrides)


def _kept(
    opened: OpenedModel, experts: int, by: By, across: bool, file: str, batches: int
) -> Mapping[LayerName, Sequence[int]]:
    """Returns the experts of each layer that stay."""
    weights = opened.weights
    check_number(weights, experts)
    least = fewest(weights)
    stream = opened.batches(batches, file)
    if by == "loss":
        return LeaveOneOut(weights, tuple(stream)).greedy(experts, least, across=across)
    if by not in ("load", "gate", "output"):
        raise ConfigError(f"by={by!r} is none of load, gate, output and loss")
    scores = {name: use.score(by) for name, use in use_of(weights, stream).items()}
    if across:
        return best_of_all_layers(scores, experts, least)
    return best_of_each_layer(scores, experts)


def merge(
    source: str | Path,
    output: str | Path,
    *,
    experts: int,
    file: str = "",
    batches: int = 8,
    step: Step = None,
    family: str = "",
    overrides: Mapping[str, Any] | None = None,
) -> ChangedModel:
    """Writes a model in which similar experts are merged (M-SMoE, 2310.01334).

    The most used experts of each layer are heads of groups, and the others join the head whose
    logits are most similar. Hidden units are aligned, and weights are means by use.

    Args:
        source: Workdir of a run, or folder of a model.
        output: Folder to write, empty or missing.
        experts: Number of experts that a layer keeps.
        file: Text on which use and logits are measured; "" for the validation set of a run.
        batches: Largest number of batches of the text.
        step: Step of the checkpoint of a run, or ``best``; ``None`` for the newest intact one.
        family: ``model_type`` of the output, if ``source`` is no run; "" for one that fits.
        overrides: New settings of a run by dotted name, such as ``training.steps``.

    Raises:
        ConfigError: If a router needs more experts, or there is no text. The error is raised before
            anything is written.

    Examples:
        >>> import moe_jax as mj
        >>> changed = mj.merge("runs/tiny", "runs/merged", experts=4)  # trained for ``train``
        >>> changed.experts, mj.open_run("runs/merged").step
        ({0: 4}, 0)
    """

    def change(opened: OpenedModel) -> tuple[LayerWeights, str]:
        weights = opened.weights
        check_number(weights, experts)
        merged = {}
        for name, use in use_of(weights, opened.batches(batches, file)).items():
            group = groups_of(use.load, cosines(use.logits), experts)
            merged[name] = merged_layer(mixtures(weights)[name], group, use.load)
        return with_mixtures(weights, merged), "experts are merged"

    return _changed(source, output, step, change, family, overrides)


def grow(
    source: str | Path,
    output: str | Path,
    *,
    copies: int = 0,
    parts: int = 0,
    hidden: int = 0,
    copy: Sequence[int] = (),
    layers: Sequence[int] = (),
    noise: float = 0.0,
    seed: int = 0,
    step: Step = None,
    family: str = "",
    overrides: Mapping[str, Any] | None = None,
) -> ChangedModel:
    """Writes a model with more experts, or with wider ones, in one of four ways.

    Args:
        source: Workdir of a run, or folder of a model.
        output: Folder to write, empty or missing.
        copies: Number of copies of each expert, of which a token chooses all; ``k`` grows with it.
        parts: Number of parts into which each expert is cut; ``k`` grows with it.
        hidden: New hidden width of the experts.
        copy: Indices of experts that get one more copy; ``k`` stays.
        layers: Indices of the layers that change; empty for all layers.
        noise: Deviation of noise on experts and router, relative to that of each array; 0 keeps
            copies equal.
        seed: Seed of noise and new units.
        step: Step of the checkpoint of a run, or ``best``; ``None`` for the newest intact one.
        family: ``model_type`` of the output, if ``source`` is no run; "" for one that fits.
        overrides: New settings of a run by dotted name, such as ``training.steps``.

    Raises:
        ConfigError: If not exactly one way is given, or a router cannot work with so many experts.
            The error is raised before anything is written.

    Examples:
        >>> import moe_jax as mj
        >>> changed = mj.grow("tiny-mixtral", "tiny-grown", parts=2)
        >>> changed.experts, changed.difference, changed.kind
        ({0: 8}, '', 'hf')
        >>> before, after = (mj.load_hf(f) for f in ("tiny-mixtral", "tiny-grown"))
        >>> bool(abs(after.logits([[1, 2, 3]]) - before.logits([[1, 2, 3]])).max() < 1e-5)
        True
    """
    given = {"copies": copies, "parts": parts, "hidden": hidden, "copy": tuple(copy)}
    chosen = [name for name, value in given.items() if value]
    if len(chosen) != 1:
        raise ConfigError(f"give exactly one of {', '.join(given)}: {len(chosen)} are given")
    key = jax.random.key(seed)
    ways: dict[str, Callable[[MixtureLayer], Grown]] = {
        "copies": lambda mixture: copied(mixture, copies),
        "parts": lambda mixture: split(mixture, parts),
        "hidden": lambda mixture: widened(mixture, hidden, key),
        "copy": lambda mixture: with_copies(mixture, copy),
    }

    def change(opened: OpenedModel) -> tuple[LayerWeights, str]:
        return _grown(opened.weights, ways[chosen[0]], layers, noise, key)

    return _changed(source, output, step, change, family, overrides)


def _grown(
    weights: LayerWeights,
    way: Callable[[MixtureLayer], Grown],
    layers: Sequence[int],
    noise: float,
    key: jax.Array,
) -> tuple[LayerWeights, str]:
    check_changeable(weights)
    found = mixtures(weights)
    unknown = [layer for layer in layers if layer not in found]
    if unknown:
        names = ", ".join(map(str, found))
        raise ConfigError(f"layer {unknown[0]} has no experts; the MoE layers are {names}")
    new, differences = {}, []
    for index, (name, mixture) in enumerate(found.items()):
        if layers and name not in layers:
            continue
        grown = way(mixture)
        differences.append(grown.reason)
        new[name] = grown.mixture
        if noise:
            new[name] = perturbed(grown.mixture, noise, jax.random.fold_in(key, index))
    if noise:
        differences.append(f"noise={noise:g}")
    return with_mixtures(weights, new), next(filter(None, differences), "")


def _changed(
    source: str | Path,
    output: str | Path,
    step: Step,
    change: Callable[[OpenedModel], tuple[LayerWeights, str]],
    family: str,
    overrides: Mapping[str, Any] | None,
) -> ChangedModel:
    """Opens a model, changes it and writes the new one."""
    output = Path(output)
    check_output(output)
    opened = open_source(source, step)
    with opened.on_devices():
        weights, difference = change(opened)
        kind = write(opened, weights, output, family=family, overrides=overrides)
    experts = {name: mixture.num_experts for name, mixture in mixtures(weights).items()}
    sizes = opened.weights.size, weights.size
    return ChangedModel(output, kind, sizes, experts, difference)
