"""A changed model: the common way from a source through a change to a written folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar, Unpack, get_args

from moe_jax.errors import ConfigError
from moe_jax.models import ModelConfig
from moe_jax.run.best import Step, step_of
from moe_jax.surgery.continued import SavedState, check_continuable, go_on, saved_state
from moe_jax.surgery.destination import Kind, check_output, check_writable, write
from moe_jax.surgery.evidence import Batch
from moe_jax.surgery.following import FollowedChange
from moe_jax.surgery.mixture import LayerName, mixtures
from moe_jax.surgery.source import OpenedModel, open_source
from moe_jax.surgery.weights import LayerWeights

Optimizer = Literal["new", "keep"]
"""``keep`` lets a changed run go on with the state of its optimizer."""
Made = TypeVar("Made")
Planned = Callable[[LayerWeights], ModelConfig | None]
_KINDS = {"run": "run", "hf": "model of transformers", "moe_jax": "converted model"}


class ChangeOptions(TypedDict, total=False):
    """Options of every change.

    Attributes:
        step: Step of the checkpoint of a run, or ``best``; ``None``, the default, for the newest
            intact one.
        family: ``model_type`` of the output, if the source is no run; "", the default, for one
            that fits.
        overrides: New settings of a run by dotted name, such as ``training.steps``.
        drop_lookahead: True leaves out the modules that look ahead (``model.lookahead``), which
            keeps the function for the next token; False, the default, rejects a model with them.
    """

    step: Step
    family: str
    overrides: Mapping[str, Any] | None
    drop_lookahead: bool


class TextOptions(ChangeOptions, total=False):
    """Options of a change that measures experts on a text.

    Attributes:
        file: Text on which experts are measured; "", the default, for the validation set of a run.
        batches: Largest number of batches of the text; 8 by default.
    """

    file: str
    batches: int


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
        step: Step of a run that keeps its optimizer; ``None`` if there is no optimizer, or a new
            one at step 0.

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
    step: int | None = None

    def __str__(self) -> str:
        before, after = self.parameters
        numbers = sorted(set(self.experts.values()))
        span = "no" if not numbers else " to ".join(map(str, sorted({numbers[0], numbers[-1]})))
        layers = f" in {len(self.experts)} layers" if numbers else ""
        function = f"differs: {self.difference}" if self.difference else "is the same"
        start = "starts anew at step 0" if self.step is None else f"goes on at step {self.step}"
        anew = f"; its optimizer {start}" if self.kind == "run" else ""
        return (
            f"{self.folder} is a {_KINDS[self.kind]} of {after:,} parameters (before: {before:,}), "
            f"with {span} experts{layers}; the function {function}{anew}"
        )


def changed(
    source: str | Path,
    output: str | Path,
    change: Callable[[OpenedModel], tuple[LayerWeights, str]],
    *,
    step: Step = None,
    family: str = "",
    planned: Planned = lambda weights: None,
    overrides: Mapping[str, Any] | None = None,
    drop_lookahead: bool = False,
) -> ChangedModel:
    """Opens a model, changes it and writes the new one.

    Args:
        source: Workdir of a run, or folder of a model.
        output: Folder to write, empty or missing.
        change: Function that returns the new weights, and the reason for which their function
            differs; "" if it is the same.
        planned: Function that rejects a change before a text is read, and returns the
            configuration of the changed model, or ``None`` if it depends on the text.
        step: See ``ChangeOptions``.
        family: See ``ChangeOptions``.
        overrides: See ``ChangeOptions``.
        drop_lookahead: See ``ChangeOptions``.

    Raises:
        ConfigError: If the change or the output is impossible. The error is raised before anything
            is written.
    """
    output = Path(output)
    check_output(output)
    opened = open_source(source, step)
    opened = opened.without_lookahead() if drop_lookahead else opened
    check_writable(opened, planned(opened.weights), family=family, overrides=overrides)
    with opened.on_devices():
        weights, difference = change(opened)
        kind = write(opened, weights, output, family=family, overrides=overrides)
    experts = {name: mixture.num_experts for name, mixture in mixtures(weights).items()}
    sizes = opened.weights.size, weights.size
    return ChangedModel(output, kind, sizes, experts, difference)


def followed(
    source: str | Path,
    output: str | Path,
    decide: Callable[[OpenedModel], FollowedChange],
    *,
    planned: Planned = lambda weights: None,
    optimizer: Optimizer = "new",
    **options: Unpack[ChangeOptions],
) -> ChangedModel:
    """Decides on a change of experts, and writes the changed model with or without its optimizer.

    Args:
        source: Workdir of a run, or folder of a model.
        output: Folder to write, empty or missing.
        decide: Function of the opened model that returns the change.
        planned: See ``changed``.
        optimizer: ``new`` starts a run at step 0 with a new optimizer. ``keep`` goes on at the step
            of the checkpoint: moments go with their experts, and all other moments, the counts of
            updates, the random keys and the position in the data stay.
        **options: See ``ChangeOptions``.

    Raises:
        ConfigError: See ``changed``; also if ``keep`` is given for a model without the state of an
            optimizer. The error is raised before anything is written.
    """
    if optimizer not in get_args(Optimizer):
        raise ConfigError(f"optimizer={optimizer!r} is none of {' and '.join(get_args(Optimizer))}")
    if optimizer == "new":
        return changed(
            source,
            output,
            lambda opened: decide(opened)(opened.weights),
            planned=planned,
            **options,
        )
    check_output(Path(output))
    opened = open_source(source, options.get("step"))
    if options.get("family"):
        raise ConfigError("a run becomes a run: leave --family out, and convert it afterwards")
    if options.get("drop_lookahead"):
        raise ConfigError(
            "the optimizer has moments of the modules that look ahead: leave out --optimizer=keep "
            "or --drop_lookahead"
        )
    state = opened_state(opened, options.get("step"))
    overrides = options.get("overrides") or {}
    check_continuable(state.run, planned(opened.weights), overrides)
    with opened.on_devices():
        change = decide(opened)
    weights, difference = go_on(state, Path(output), change, overrides)
    experts = {name: mixture.num_experts for name, mixture in mixtures(weights).items()}
    sizes = opened.weights.size, weights.size
    return ChangedModel(Path(output), "run", sizes, experts, difference, state.step)


def opened_state(opened: OpenedModel, step: Step) -> SavedState:
    """Returns the whole state of an opened run, with its optimizer.

    Args:
        opened: The run.
        step: Step of the checkpoint, as ``open_source`` has it.

    Raises:
        ConfigError: If the model has no state of an optimizer: it is no run, or a run at step 0,
            or its adapters were trained.
    """
    folder, run = opened.folder, opened.run
    advice = "leave out --optimizer=keep"
    if run is None:
        raise ConfigError(f"{folder} is no run and has no state of an optimizer: {advice}")
    if run.experiment.model.lora is not None:
        raise ConfigError(f"the optimizer of {folder} has moments of adapters alone: {advice}")
    state = saved_state(run, step_of(folder, step))
    if not state.step:
        raise ConfigError(f"{folder} is at step 0, before the first moments: {advice}")
    return state


def on_text(
    make: Callable[[LayerWeights, Iterator[Batch]], Made], *, file: str, batches: int
) -> Callable[[OpenedModel], Made]:
    """Returns a function of an opened model that reads a text.

    Args:
        make: Function of the weights and of the batches of the text.
        file: See ``TextOptions``.
        batches: See ``TextOptions``.
    """
    return lambda opened: make(opened.weights, opened.batches(batches, file))


def reduced(
    source: str | Path,
    output: str | Path,
    change: Callable[[LayerWeights, Iterator[Batch]], LayerWeights],
    difference: str,
    *,
    planned: Planned,
    file: str = "",
    batches: int = 8,
    **options: Unpack[ChangeOptions],
) -> ChangedModel:
    """Writes a model with fewer experts, which a text selects.

    Args:
        source: Workdir of a run, or folder of a model.
        output: Folder to write, empty or missing.
        change: Function of the weights and of the batches of the text.
        difference: Reason for which the function differs.
        planned: See ``changed``.
        file: See ``TextOptions``.
        batches: See ``TextOptions``.
        **options: See ``ChangeOptions``.

    Raises:
        ConfigError: See ``changed``; also if a layer cannot have so few experts, or there is no
            text.
    """
    made = on_text(change, file=file, batches=batches)
    return changed(
        source, output, lambda opened: (made(opened), difference), planned=planned, **options
    )
