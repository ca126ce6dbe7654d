"""Compares runs on one HTML page that needs no network: results, settings that differ, losses."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax import files
from moe_jax.analysis.curves import Curve, colours, losses
from moe_jax.analysis.page import write_page
from moe_jax.config.experiment import Experiment
from moe_jax.config.schema import build, describe, flat
from moe_jax.errors import ConfigError
from moe_jax.training.metrics import read_metrics

PAGE = "compare.html"
Picture = tuple[str, str]
# Settings that name or place a run and change no number of it.
_ASIDE = (
    "name",
    "mesh.",
    "training.log_every",
    "training.writers",
    "training.checkpoint_every",
    "training.keep_",
)
# Each axis has a name and a label.
_AXES = {
    "steps": "step",
    "tokens": "training tokens",
    "flops": "training FLOPs",
    "seconds": "seconds of training",
}
# Each column has a key of ``result.json``, a title, a format, and whether the least or the greatest
# number is the best one.
_COLUMNS = (
    ("loss", "validation loss", "{:.4f}", min),
    ("bits_per_byte", "bits per byte", "{:.4f}", min),
    ("accuracy", "accuracy", "{:.1%}", max),
    ("dropped_fraction", "dropped", "{:.1%}", None),
    ("total_parameters", "parameters", "{:,}", None),
    ("active_parameters", "active", "{:,}", None),
    ("flops_per_token", "FLOPs per token", "{:,}", None),
    ("steps", "steps", "{:,}", None),
    ("tokens", "tokens", "{:,}", None),
)


@dataclasses.dataclass(frozen=True)
class ComparedRun:
    """A run as its folder describes it.

    Attributes:
        folder: Workdir of the run.
        config: Settings of the run.
        result: Content of ``result.json``, empty while the run is unfinished.
        records: Lines of ``metrics.jsonl``.
    """

    folder: Path
    config: Experiment
    result: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]

    @property
    def settings(self) -> dict[str, Any]:
        """Settings by dotted name; settings that change no number are left out."""
        named = flat(describe(self.config))
        return {name: value for name, value in named.items() if not name.startswith(_ASIDE)}

    @functools.cached_property
    def lines(self) -> list[Mapping[str, Any]]:
        """Training lines with a finite loss."""
        return [r for r in self.records if r["kind"] == "train" and r["loss"] is not None]

    def places(self, axis: str) -> np.ndarray:
        """Returns the place ``(T,)`` of every training line on an axis."""
        steps = np.array([line["step"] for line in self.lines], np.float64)
        tokens = steps * self.config.tokens_per_step
        if axis in ("steps", "tokens"):
            return steps if axis == "steps" else tokens
        rates = np.array([line["tokens_per_second"] for line in self.lines], np.float64)
        if axis == "seconds":
            # The rate of the first line includes compilation.
            rates[:1] = np.median(rates)
            return np.cumsum(np.diff(tokens, prepend=0.0) / rates)
        flops = [line.get("model_flops_per_second", np.nan) for line in self.lines]
        return tokens * np.array(flops, np.float64) / rates

    def curve(self, axis: str) -> Curve:
        """Returns the losses of the run over an axis."""
        steps, x = self.places("steps"), self.places(axis)
        found = [r for r in self.records if r["kind"] == "eval" and r["loss"] is not None]
        eval_steps = np.array([record["step"] for record in found], np.float64)
        eval_x = np.interp(eval_steps, steps, x) if len(steps) else eval_steps[:0]
        eval_loss = np.array([record["loss"] for record in found], np.float64)[: len(eval_x)]
        return Curve(x, np.array([line["loss"] for line in self.lines]), eval_x, eval_loss)


def compare(workdirs: Iterable[str | Path], output: str | Path = PAGE) -> Path:
    """Writes a page that shows runs beside each other, finished or not.

    The page has the results of all runs, the settings that differ, and the losses over steps,
    tokens, FLOPs and seconds. The seconds of training steps exclude compilation and
    evaluations. The page needs no network.

    Args:
        workdirs: Folders of two runs or more.
        output: HTML file to write.

    Returns:
        Path of the page.

    Raises:
        ConfigError: If there are fewer than two folders, or a folder holds no run.
        ValueError: If a file of a run is damaged.

    Examples:
        >>> import moe_jax as mj
        >>> try:
        ...     mj.compare(["runs/a"])
        ... except mj.ConfigError as error:
        ...     print(error)
        a comparison needs two runs or more: moe-jax compare runs/a runs/b
    """
    folders = [Path(folder) for folder in workdirs]
    if len(folders) < 2:
        raise ConfigError("a comparison needs two runs or more: moe-jax compare runs/a runs/b")
    files.check_file(Path(output), "--output")
    return write_comparison(folders, Path(output), title="Comparison of runs")


def write_comparison(
    folders: Sequence[Path], output: Path, *, title: str, pictures: Sequence[Picture] = ()
) -> Path:
    """Writes the page of ``compare`` with a title and pictures that stand before the losses."""
    runs = [opened(folder) for folder in folders]
    shades = colours(len(runs))
    names = _labels(folders)
    curves = [(axis, [run.curve(axis) for run in runs]) for axis in _AXES]
    drawn = [(_title(axis), losses(of_axis, _AXES[axis])) for axis, of_axis in curves]
    return write_page(
        "compare.html.j2",
        output,
        title=title,
        columns=[name for _, name, _, _ in _COLUMNS],
        results=list(zip(names, shades, _cells(runs), strict=True)),
        names=names,
        shades=shades,
        differences=differences({n: run.settings for n, run in zip(names, runs, strict=True)}),
        pictures=list(pictures),
        curves=drawn,
    )


def opened(folder: Path) -> ComparedRun:
    """Returns the run of a folder.

    Raises:
        ConfigError: If the folder holds no run, or settings that this version does not know.
    """
    saved = _json(folder / "config.json")
    if "config" not in saved:
        raise ConfigError(f"{folder} holds no run: train one there first")
    try:
        config = build(Experiment, saved["config"])
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.json'} cannot be read: {error}") from error
    return ComparedRun(folder, config, _json(folder / "result.json"), read_metrics(folder))


def differences(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Returns the settings that differ between runs, with the value in each run as text.

    Args:
        settings: Settings of each run by dotted name; one that a run lacks is shown as "–".
    """
    names = dict.fromkeys(name for one in settings.values() for name in one)
    rows = {name: [str(one.get(name, "–")) for one in settings.values()] for name in names}
    return {name: values for name, values in rows.items() if len(set(values)) > 1}


def _title(axis: str) -> str:
    return f"Loss by {'FLOPs' if axis == 'flops' else axis}"


def _labels(folders: Sequence[Path]) -> list[str]:
    """Returns the names of the folders, or their paths below the common one if names are equal."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) == len(names):
        return names
    paths = [str(folder.resolve()) for folder in folders]
    common = os.path.commonpath(paths)
    return [os.path.relpath(path, common) for path in paths]


def _cells(runs: Sequence[ComparedRun]) -> list[list[tuple[str, bool]]]:
    """Returns for each run the cells of its row: text, and whether the number is the best."""
    columns = []
    for key, _, template, best in _COLUMNS:
        values = [run.result.get(key) for run in runs]
        known = [value for value in values if value is not None]
        top = best(known) if best and len(set(known)) > 1 else None
        texts = ["–" if value is None else template.format(value) for value in values]
        columns.append(
            [(t, v is not None and v == top) for t, v in zip(texts, values, strict=True)]
        )
    return [list(row) for row in zip(*columns, strict=True)]


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): restore or delete it") from error
    return content if isinstance(content, dict) else {}
