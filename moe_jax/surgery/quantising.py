"""Writes a model whose experts are quantised, and reports its size and its error."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.errors import ConfigError
from moe_jax.interop import folders
from moe_jax.quantised.codes import Precision, check_precision
from moe_jax.quantised.packed import PackedLeaves, is_packed, recorded_note
from moe_jax.run.best import Step
from moe_jax.run.exported import checkpoint_of
from moe_jax.surgery.destination import Kind, check_output, check_writable, write
from moe_jax.surgery.evidence import Batch, check_measurable
from moe_jax.surgery.mixture import LayerName
from moe_jax.surgery.model_difference import ModelDifference, compare
from moe_jax.surgery.quantise import (
    PrecisionChoice,
    Precisions,
    activity_of,
    check_group,
    expert_matrices,
    output_errors,
    quantised,
    sizes,
    uniform,
    with_codes,
)
from moe_jax.surgery.source import OpenedModel, open_source
from moe_jax.surgery.weights import LayerWeights

VALIDATION = "validation"


@dataclasses.dataclass(frozen=True)
class QuantisedModel:
    """A model with quantised experts that was written.

    Attributes:
        folder: Folder of the model.
        kind: Kind of the folder: ``run``, ``hf`` or ``moe_jax`` (converted).
        expert_bytes: Bytes of the experts' linear maps before, and of codes and scales.
        model_bytes: Bytes of all weights before and after.
        precisions: Precision of each expert, by layer.
        difference: Error of the logits, and bits per byte before and after; ``None`` without a
            text.

    Examples:
        >>> import moe_jax as mj
        >>> small = mj.quantise("tiny-mixtral", "tiny-int4", bits="int4")
        >>> small.kind, small.precisions
        ('moe_jax', {0: ('int4', 'int4', 'int4', 'int4')})
        >>> before, after = small.expert_bytes
        >>> before / after > 4  # 32 bits became 4 and a scale
        True
    """

    folder: Path
    kind: Kind
    expert_bytes: tuple[int, int]
    model_bytes: tuple[int, int]
    precisions: Precisions
    difference: ModelDifference | None

    def __str__(self) -> str:
        numbers = collections.Counter(p for of in self.precisions.values() for p in of)
        experts = " and ".join(
            f"{n} experts in {precision}" for precision, n in sorted(numbers.items())
        )
        before, after = self.expert_bytes
        whole, small = self.model_bytes
        unpacked = "; the folder holds the weights of the codes" if self.kind == "hf" else ""
        difference = self.difference or "without a text, its error is not measured (--file)"
        return (
            f"{self.folder} has {experts} of {after:,} bytes (before: {before:,}) in a "
            f"model of {small:,} bytes (before: {whole:,}){unpacked}; {difference}"
        )


def quantise(
    source: str | Path,
    output: str | Path,
    *,
    bits: Precision,
    group: int = 0,
    calibration: str = "",
    budget: int = 0,
    file: str = "",
    batches: int = 8,
    step: Step = None,
    family: str = "",
    overrides: Mapping[str, Any] | None = None,
) -> QuantisedModel:
    """Writes a model whose experts' weights are int8, int4 or fp8 codes with scales.

    Biases, routers, norms and all other weights stay as they are.

    Args:
        source: Workdir of a run, or folder of a model.
        output: Folder to write, empty or missing.
        bits: Precision ``int8``, ``int4`` or ``fp8`` (e4m3).
        group: Number of input channels that share a scale; 0 for one scale per output channel.
        calibration: Text from which factors of input channels are computed (AWQ, 2306.00978), or
            ``validation`` for the validation set of a run; "" for no factors.
        budget: Largest number of bytes of the experts; the experts whose output suffers most from
            int4 get ``bits``, and the others int4. 0 gives all experts ``bits``.
        file: Text on which error and sensitivity are measured; "" for the validation set of a run,
            else for the text of ``calibration``.
        batches: Largest number of batches of each text.
        step: Step of the checkpoint of a run, or ``best``; ``None`` for the newest intact one.
        family: ``model_type`` of a folder of ``transformers``, which holds the weights that the
            codes stand for; "" for a converted model with codes, if ``source`` is no run.
        overrides: New settings of a run by dotted name, such as ``training.steps``.

    Raises:
        ConfigError: If the source is quantised already or has no experts, if the group or the
            budget does not fit, or if there is no text. The error is raised before anything is
            written.

    Examples:
        >>> import moe_jax as mj
        >>> small = mj.quantise("runs/tiny", "runs/int8", bits="int8")  # trained for ``train``
        >>> small.kind, small.difference.logits_error < 0.05
        ('run', True)
        >>> mj.open_run("runs/int8").generate("abc", tokens=4).startswith("abc")
        True
    """
    output = Path(output)
    check_output(output)
    recipe = _Recipe(check_precision(bits), group, calibration, budget, file, batches)
    _check_source(Path(source), step)
    opened = open_source(source, step)
    check_writable(opened, opened.weights.model, family=family, overrides=overrides)
    recipe.check_text(opened)
    with opened.on_devices():
        precisions, packed = recipe.codes(opened)
        weights = with_codes(opened.weights, packed)
        difference = recipe.difference(opened, weights)
        kind = write(opened, weights, output, family=family, overrides=overrides, packed=packed)
    before, whole = _bytes(opened.weights, packed)
    model_bytes = whole, whole - before + packed.size
    return QuantisedModel(output, kind, (before, packed.size), model_bytes, precisions, difference)


def _bytes(weights: LayerWeights, packed: PackedLeaves) -> tuple[int, int]:
    """Returns the bytes of the weights that become codes, and of all weights."""
    sizes_of = {name: array.nbytes for name, array in weights.arrays.items()}
    return sum(sizes_of[name] for name in packed.arrays), sum(sizes_of.values())


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """The arguments of ``quantise`` that say how codes are found."""

    bits: Precision
    group: int
    calibration: str
    budget: int
    file: str
    batches: int

    def __post_init__(self) -> None:
        if self.budget < 0:
            raise ConfigError(f"budget={self.budget} is negative: give a number of bytes")
        if self.budget and self.bits == "int4":
            raise ConfigError(
                "budget chooses between int4 and more bits, and bits='int4' leaves no choice: use "
                "bits='int8', or no budget"
            )

    def codes(self, opened: OpenedModel) -> tuple[dict[LayerName, Any], PackedLeaves]:
        """Returns the precision of each expert, and the codes."""
        weights = opened.weights
        expert_matrices(weights)
        check_group(weights, self.group)
        if self.budget:  # before a text is read
            self._choice(weights).within(self.budget)
        activity = None
        if self.calibration:
            text = "" if self.calibration == VALIDATION else self.calibration
            check_measurable(weights)
            activity = activity_of(weights, opened.batches(self.batches, text))
        made = functools.partial(quantised, weights, group=self.group, activity=activity)
        if not self.budget:
            precisions = uniform(weights, self.bits)
            return precisions, made(precisions)
        others = [with_codes(weights, made(uniform(weights, p))) for p in ("int4", self.bits)]
        coarse, fine = output_errors(weights, others, self._text(opened))
        gain = {name: error - fine[name] for name, error in coarse.items()}
        choice = dataclasses.replace(self._choice(weights), gain=gain)
        precisions = choice.within(self.budget)
        return precisions, made(precisions)

    def _choice(self, weights: LayerWeights) -> PrecisionChoice:
        """Returns the choice between int4 and ``bits``, without a gain of more bits."""
        low, high = (
            sizes(weights, precision, self.group, factors=bool(self.calibration))
            for precision in ("int4", self.bits)
        )
        none = {name: np.zeros(len(of)) for name, of in low.items()}
        return PrecisionChoice("int4", self.bits, none, low, high)

    def _text(self, opened: OpenedModel) -> Iterator[Batch]:
        """Returns the batches on which error and sensitivity are measured.

        Raises:
            ConfigError: If there is no text.
        """
        calibration = "" if self.calibration == VALIDATION else self.calibration
        file = self.file or ("" if opened.run is not None else calibration)
        return opened.batches(self.batches, file)

    def check_text(self, opened: OpenedModel) -> None:
        """Rejects a text that cannot be read, before anything is computed.

        Raises:
            ConfigError: If the file or the tokenizer is missing or cannot be read.
        """
        if self._measured(opened):
            next(self._text(opened), None)

    def _measured(self, opened: OpenedModel) -> bool:
        return opened.run is not None or bool(self.file or self.calibration)

    def difference(self, opened: OpenedModel, weights: LayerWeights) -> ModelDifference | None:
        """Returns the difference to the source on a text; ``None`` without a text."""
        if not self._measured(opened):
            return None
        lengths = opened.tokenizer().byte_lengths
        return compare(opened.weights, weights, self._text(opened), lengths)


def _check_source(folder: Path, step: Step) -> None:
    """Rejects a model whose weights are those of codes.

    Raises:
        ConfigError: If so.
    """
    kind, where = folders.kind_of(folder), folder
    quantised_already = bool(recorded_note(folder))
    if kind == "run":
        where = checkpoint_of(folder, step)
    elif kind in ("hf", "moe_jax"):
        original = folders.describe(folder).original
        quantised_already |= bool(original.get("quantization_config"))
    if quantised_already or is_packed(where):
        raise ConfigError(
            f"{folder} holds quantised weights already: quantise the model that they come from"
        )
