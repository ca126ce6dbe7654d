"""Upcycles, prunes, merges, distils and grows models in folders."""

from __future__ import annotations

import dataclasses
import functools
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Unpack

import jax

from moe_jax import routing
from moe_jax.config.experiment import TrainingConfig
from moe_jax.config.loading import experiment_of
from moe_jax.errors import ConfigError
from moe_jax.interop import folders
from moe_jax.models import ModelConfig
from moe_jax.run.predecessors import open_finished
from moe_jax.surgery import upcycle as dense
from moe_jax.surgery.changed import (
    ChangedModel,
    ChangeOptions,
    Optimizer,
    TextOptions,
    changed,
    followed,
    on_text,
    reduced,
)
from moe_jax.surgery.evidence import Batch, LeaveOneOut, check_loads, use_of
from moe_jax.surgery.following import FollowedChange
from moe_jax.surgery.growth import Growth
from moe_jax.surgery.merge import Merging, cosines, groups_of, redirecting_model
from moe_jax.surgery.mixture import LayerName, neighbours_of
from moe_jax.surgery.prune import Pruning, best, fewest, reduced_model
from moe_jax.surgery.source import OpenedModel
from moe_jax.surgery.student import Start, any_groups, dense_model, routing_groups, smaller
from moe_jax.surgery.student import dense as dense_student
from moe_jax.surgery.weights import LayerWeights

By = Literal["load", "gate", "output", "loss"]
# Weights of losses that a run does not use at 0; it uses all other settings at 0 too.
_UNUSED = ("training.routing_weight",)


def upcycle(
    source: str | Path,
    output: str | Path,
    *,
    experts: int = 8,
    k: int | None = None,
    shards: int = 1,
    layers: Sequence[LayerName] = (),
    redrawn: float = 0.0,
    router: str = "mixtral",
    seed: int = 0,
    **options: Unpack[ChangeOptions],
) -> ChangedModel:
    """Writes a mixture whose experts are copies, or parts of copies, of a dense model's networks.

    Args:
        source: Workdir of a dense run, or folder of a dense model.
        output: Folder to write, empty or missing.
        experts: Number of experts per layer.
        k: Number of experts per token; ``None`` for 2, or for the router's own number if it has no
            ``k``.
        shards: Number of parts of equal width of each network (2410.07524); 1 copies whole ones.
        layers: Layers that get experts, by index or by name such as ``encoder 1``; an index alone
            means this layer of each stack. Empty for all layers.
        redrawn: Share of each expert's hidden units that is drawn again (2502.19261).
        router: Name of a router.
        seed: Seed of the routers and of the weights that are drawn again.
        **options: See ``moe_jax.surgery.changed.ChangeOptions``.

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
    recipe = dense.Upcycling(experts, _router(router, k), shards, tuple(layers), redrawn)
    same = dense.keeps_function(recipe)
    difference = "" if same else "its gates or weights do not add up to the dense network"
    key = jax.random.key(seed)

    def change(opened: OpenedModel) -> tuple[LayerWeights, str]:
        return dense.upcycle(opened.weights, recipe, key), difference

    return changed(source, output, change, **options)


def _router(name: str, k: int | None) -> routing.Router:
    """Returns the router of this name, with ``k`` experts per token if it has ``k``."""
    if k is None and "k" not in routing.choices_of(name):
        return routing.preset(name)
    return routing.preset(name, k=2 if k is None else k)


def prune(
    source: str | Path,
    output: str | Path,
    *,
    experts: int,
    by: By = "load",
    across: bool = False,
    optimizer: Optimizer = "new",
    **options: Unpack[TextOptions],
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
        optimizer: ``new`` starts a run at step 0; ``keep`` goes on at the step of the checkpoint,
            with the state of the optimizer (see ``moe_jax.surgery.changed.followed``).
        **options: See ``moe_jax.surgery.changed.TextOptions``.

    Raises:
        ConfigError: If a router needs more experts, there is no text, or experts that choose tokens
            are to be compared by load or loss. The error is raised before anything is written.

    Examples:
        >>> import moe_jax as mj
        >>> changed = mj.prune("runs/tiny", "runs/pruned", experts=6)  # trained for ``train``
        >>> changed.kind, changed.experts
        ('run', {0: 6})
        >>> mj.open_run("runs/pruned").generate("abc", tokens=4).startswith("abc")
        True
    """

    def change(weights: LayerWeights, stream: Iterator[Batch]) -> Pruning:
        return Pruning(_kept(weights, stream, experts, by, across))

    planned = functools.partial(reduced_model, experts=experts, across=across)
    decide, others = _on_text(change, options)
    return followed(source, output, decide, planned=planned, optimizer=optimizer, **others)


def _on_text(
    change: Callable[[LayerWeights, Iterator[Batch]], FollowedChange], options: TextOptions
) -> tuple[Callable[[OpenedModel], FollowedChange], ChangeOptions]:
    """Returns the function that decides on a change by a text, and the options without the text."""
    file, batches = options.pop("file", ""), options.pop("batches", 8)
    others: Any = options
    return on_text(change, file=file, batches=batches), others


def _kept(
    weights: LayerWeights, stream: Iterator[Batch], experts: int, by: By, across: bool
) -> Mapping[LayerName, Sequence[int]]:
    """Returns the experts of each layer that stay."""
    if by in ("load", "loss"):
        check_loads(weights, "select them by gate or output")
    if by == "loss":
        one_by_one = LeaveOneOut(weights, tuple(stream))
        return one_by_one.greedy(experts, fewest(weights), across=across)
    if by not in ("load", "gate", "output"):
        raise ConfigError(f"by={by!r} is none of load, gate, output and loss")
    scores = {name: use.score(by) for name, use in use_of(weights, stream).items()}
    return best(scores, experts, fewest(weights) if across else None, neighbours_of(weights))


def merge(
    source: str | Path,
    output: str | Path,
    *,
    experts: int,
    across: bool = False,
    redirect: bool = False,
    optimizer: Optimizer = "new",
    **options: Unpack[TextOptions],
) -> ChangedModel:
    """Writes a model in which similar experts are merged (M-SMoE, 2310.01334).

    The most used experts are heads of groups, and every other expert joins the head of its layer
    whose logits are most similar. Hidden units are aligned, and weights are means by use.

    Args:
        source: Workdir of a run, or folder of a model.
        output: Folder to write, empty or missing.
        experts: Number of groups of a layer; the mean over layers if ``across``.
        across: True takes the most used experts of all layers as heads, as the paper does, so that
            layers differ in their number of groups. False gives every layer ``experts`` groups.
        redirect: True keeps all logits of the router and sends the choices of a member to the
            merged expert, as the paper does; no family of ``transformers`` has such a router.
            False keeps the logits of the heads.
        optimizer: ``new`` starts a run at step 0; ``keep`` goes on at the step of the checkpoint,
            with the state of the optimizer (see ``moe_jax.surgery.changed.followed``).
        **options: See ``moe_jax.surgery.changed.TextOptions``.

    Raises:
        ConfigError: If a router needs more experts, or there is no text. The error is raised before
            anything is written.

    Examples:
        >>> import moe_jax as mj
        >>> changed = mj.merge("runs/tiny", "runs/merged", experts=4)  # trained for ``train``
        >>> changed.experts, mj.open_run("runs/merged").step
        ({0: 4}, 0)
    """

    def change(weights: LayerWeights, stream: Iterator[Batch]) -> Merging:
        return _merging(weights, stream, experts, across, redirect)

    model = redirecting_model if redirect else reduced_model
    planned = functools.partial(model, experts=experts, across=across)
    decide, others = _on_text(change, options)
    return followed(source, output, decide, planned=planned, optimizer=optimizer, **others)


def _merging(
    weights: LayerWeights, stream: Iterator[Batch], experts: int, across: bool, redirect: bool
) -> Merging:
    """Returns the groups of each layer, whose experts are merged."""
    check_loads(weights, "prune them by gate or output")
    uses = use_of(weights, stream)
    shares = {name: use.score("load") for name, use in uses.items()}
    least = dict.fromkeys(uses, 1) if redirect else fewest(weights)
    # Redirected logits stay in their groups of neighbours, whatever experts they share.
    near = dict.fromkeys(uses, 1) if redirect else neighbours_of(weights)
    chosen = best(shares, experts, least if across else None, near)
    groups = {
        name: groups_of(use.load, cosines(use.logits), len(chosen[name]), near[name])
        for name, use in uses.items()
    }
    return Merging(groups, {name: use.load for name, use in uses.items()}, redirect)


def distil(
    source: str | Path,
    output: str | Path,
    *,
    experts: int,
    student: Literal["dense", "mixture"] = "dense",
    start: Start = "merge",
    weight: float = 0.5,
    temperature: float = 1.0,
    routing: float = 0.0,
    **options: Unpack[TextOptions],
) -> ChangedModel:
    """Writes a run at step 0 that learns from a mixture and begins with the mixture's experts.

    The student learns on its own data, such as the text of one domain. ``moe_jax.train`` of the
    written folder trains it.

    Args:
        source: Workdir of a finished run, the teacher; or folder of a released or converted model.
            The student of a folder is a folder, and ``training.teacher`` of its run names the
            source.
        output: Folder to write, empty or missing.
        experts: Number of experts of a smaller mixture; number of groups of experts whose hidden
            units a dense network has side by side, beside those of shared experts.
        student: ``dense`` or ``mixture``.
        start: ``merge`` merges each expert into the group of a much used one, ``prune`` leaves the
            less used experts out.
        weight: Weight of the cross-entropy with the teacher's probabilities; the cross-entropy with
            the data has the weight ``1 - weight``.
        temperature: Temperature of the cross-entropy with the teacher.
        routing: Weight of the divergence of the student's routing distributions from the
            teacher's, whose probabilities are summed over the experts of a group; for a mixture.
        **options: See ``moe_jax.surgery.changed.TextOptions``. ``overrides`` has the settings of
            the student's run, such as ``data.source``.

    Raises:
        ConfigError: If the source is no finished run and no model, or the student does not fit.
            The error is raised before anything is written.

    Examples:
        >>> import moe_jax as mj
        >>> changed = mj.distil("runs/tiny", "runs/student", experts=1)  # trained for ``train``
        >>> changed.experts, mj.open_run("runs/student").config.training.teacher
        ({}, 'runs/tiny')
    """
    if routing and student == "dense":
        raise ConfigError("a dense student has no router: leave --routing out")
    taught = {
        "training.teacher": str(source),
        "training.teacher_weight": weight,
        "training.teacher_temperature": temperature,
        "training.routing_weight": routing,
    }
    settings = _settings_of_student(source, taught, options)
    difference = "a student approximates its teacher"
    make = dense_student if student == "dense" else smaller

    def change(weights: LayerWeights, stream: Iterator[Batch]) -> LayerWeights:
        check_loads(weights, "prune them by gate or output, and train the result with a teacher")
        uses = use_of(weights, stream)
        if routing:
            found = routing_groups(weights, uses, experts, start)
            settings["training.routing_groups"] = found
        return make(weights, uses, experts, start)

    def planned(weights: LayerWeights) -> ModelConfig | None:
        model = (dense_model if student == "dense" else reduced_model)(weights, experts)
        if routing:  # Settings are checked before the text is read.
            settings["training.routing_groups"] = any_groups(weights, experts)
        return model

    made = reduced(source, output, change, difference, planned=planned, **options)
    if made.kind == "run":
        return made
    return dataclasses.replace(made, difference=difference + _of_released(output, settings))


def _settings_of_student(
    source: str | Path, taught: Mapping[str, Any], options: TextOptions
) -> dict[str, Any]:
    """Returns the settings of a student; the student of a run has them as ``overrides``.

    Raises:
        ConfigError: If the teacher is no finished run and no model, or a setting does not fit.
    """
    settings = {**taught, **(options.get("overrides") or {})}
    if folders.kind_of(Path(source)) == "run":
        teacher = open_finished("training.teacher", str(source))
        experiment_of(teacher.experiment, settings)  # before the text is read
        options["overrides"] = settings
    else:
        TrainingConfig(**{name.removeprefix("training."): of for name, of in taught.items()})
    return settings


def _of_released(output: str | Path, taught: Mapping[str, Any]) -> str:
    """Returns how the student of a released model is trained, as the end of a sentence."""
    given = {name: of for name, of in taught.items() if of or name not in _UNUSED}
    texts = {name: str(value).replace(" ", "") for name, value in given.items()}
    flags = " ".join(shlex.quote(f"--config.{name}={text}") for name, text in texts.items())
    return f", and is trained with --config=from_hf:{output} {flags}"


def grow(
    source: str | Path,
    output: str | Path,
    *,
    copies: int = 0,
    parts: int = 0,
    hidden: int = 0,
    copy: Sequence[int] = (),
    layers: Sequence[LayerName] = (),
    noise: float = 0.0,
    seed: int = 0,
    optimizer: Optimizer = "new",
    **options: Unpack[ChangeOptions],
) -> ChangedModel:
    """Writes a model with more experts, or with wider ones, in one of four ways.

    Args:
        source: Workdir of a run, or folder of a model.
        output: Folder to write, empty or missing.
        copies: Number of copies of each expert, of which a token chooses all; ``k`` grows with it.
        parts: Number of parts into which each expert is cut; ``k`` grows with it.
        hidden: New hidden width of the experts.
        copy: Indices of experts that get one more copy; ``k`` stays.
        layers: Layers that change, by index or by name such as ``encoder 1``; an index alone means
            this layer of each stack. Empty for all layers.
        noise: Deviation of the noise on each array of experts and router, as a share of the
            deviation of the array; 0 keeps copies equal.
        seed: Seed of noise and new units.
        optimizer: ``new`` starts a run at step 0; ``keep`` goes on at the step of the checkpoint,
            with the state of the optimizer (see ``moe_jax.surgery.changed.followed``).
        **options: See ``moe_jax.surgery.changed.ChangeOptions``.

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
    growth = Growth(copies, parts, hidden, copy, layers, noise, seed)
    growth.way()  # before the model is read
    return followed(source, output, lambda opened: growth, optimizer=optimizer, **options)
