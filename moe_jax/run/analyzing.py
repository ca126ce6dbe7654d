"""Analyses a corpus in the experts of the model of a folder."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_jax import counting, data
from moe_jax.analysis import atlas
from moe_jax.analysis.drift import drift
from moe_jax.analysis.foresight import foresight
from moe_jax.analysis.forward import check_separate, sparse_layers
from moe_jax.analysis.observed import Observed, ObservedLayer, observe, similarities
from moe_jax.analysis.texts import Text
from moe_jax.data.directory import check_directory
from moe_jax.data.files import check_files, open_all_files
from moe_jax.errors import ConfigError
from moe_jax.files import finite
from moe_jax.interop.folders import kind_of
from moe_jax.models import ModelConfig
from moe_jax.models.config import Tokens
from moe_jax.monitor import ALARMS
from moe_jax.run import workdir
from moe_jax.run.alarms import alarms_of
from moe_jax.run.best import Step, step_of
from moe_jax.run.corpus import read
from moe_jax.run.opened import FolderModel, check_folder, open_folder
from moe_jax.training.step_folders import steps_of

_LABELLED = re.compile(r"([^=:]+)=(.+)", re.DOTALL)
_MOST_TOKENS = 12
UNLABELLED = ""
VALIDATION = "validation"


def analyze(
    folder: str | Path,
    corpus: str | Sequence[str],
    *,
    step: Step = None,
    earlier: Sequence[int] = (),
    documents: int = 64,
    length: int = 256,
    batch_size: int = 8,
    flops_per_joule: float = 5e11,
) -> dict[str, Any]:
    """Analyses a corpus in the experts of a model.

    A document is read up to ``length`` tokens, with the capacity of evaluation; experts that choose
    tokens choose among each document by itself. An encoder-decoder reads a part of the document and
    its decoder the rest; see ``moe_jax.run.corpus``.

    Args:
        folder: Folder of a run, of a converted model, or of a model of ``transformers``.
        corpus: A data source, whose validation part is read; ``validation``, the validation
            documents of a run, of which each part of a blend is a group; or groups
            ``NAME=files:GLOB``, of which all files are read.
        step: Step of the checkpoint of a run, or ``best``; ``None`` for the newest intact one.
        earlier: Steps of earlier checkpoints of the run, for saturation.
        documents: Largest number of documents per group.
        length: Largest number of tokens per document.
        batch_size: Number of documents that are read at once.
        flops_per_joule: FLOPs per joule of the device, for the estimate of energy.

    Returns:
        ``layers``, ``groups``, ``gap``, ``drift``, ``energy``, ``atlas`` and ``saturation``.

    Raises:
        ConfigError: If the model has no experts or soft slots, if the corpus
            mixes groups and sources, repeats a name, or holds no document, or if an earlier step
            is no checkpoint of a run.

    Examples:
        >>> import moe_jax as mj
        >>> found = mj.analyze("runs/tiny", "mixture", documents=2, length=16)
        >>> (layer,) = found["layers"]
        >>> round(sum(layer["load"]), 3), found["groups"][0]["documents"]
        (1.0, 2)
    """
    sources = groups_of([corpus] if isinstance(corpus, str) else corpus)

    def check(config: ModelConfig) -> None:
        require_analysable(config)
        config.check_length(length, "--length")

    check_folder(folder, check, texts=True)
    _check_earlier(folder, earlier, step)
    judge = alarms_of(folder, step)
    groups = _groups(folder, sources, documents)
    opened = open_folder(folder, step, check)
    read_texts, labels, sizes = read(opened, list(groups.values()), documents, length)
    found, more = _observed(opened, read_texts, batch_size)
    own_labels = labels if len(groups) > 1 else None
    layers = [layer for one in found for layer in atlas.layers_of(one, own_labels)]
    names = [name or "all" for name in groups]
    own = [_of_group(found, labels == group) for group in range(len(names))]
    quality = zip(atlas.quality(found, labels, names, sizes), own, strict=True)
    return {
        "groups": [{**one, ALARMS: judge(_line(opened, part))} for one, part in quality],
        "gap": atlas.gap(found, labels, names, sizes),
        "drift": _drifts(names, own),
        "layers": [{**layer, **one} for layer, one in zip(layers, more, strict=True)],
        "saturation": [_saturation(folder, one, read_texts, batch_size, found) for one in earlier],
        "energy": _energy(opened, read_texts, flops_per_joule),
        "atlas": _atlas(opened, found),
    }


def groups_of(corpus: Sequence[str]) -> dict[str, str]:
    """Returns the data source of each group by name; one source without a label has no name.

    Raises:
        ConfigError: If there is no source, a name is repeated, or one of several has no name.
    """
    matches = [_LABELLED.fullmatch(each) for each in corpus]
    if len(corpus) == 1 and matches[0] is None:
        return {UNLABELLED: corpus[0]}
    found: dict[str, str] = {}
    for each, match in zip(corpus, matches, strict=True):
        if match is None:
            raise ConfigError(
                f"--corpus={each} has no label, which several groups need: write NAME=files:GLOB"
            )
        name, source = match.groups()
        if name in found:
            raise ConfigError(f"--corpus names the group {name!r} twice: rename one")
        if not source.startswith("files:"):
            raise ConfigError(
                f"--corpus={each} is not NAME=files:GLOB: give the files of the group"
            )
        found[name] = source
    if not found:
        raise ConfigError("--corpus is missing: add --corpus=files:GLOB")
    return found


def require_analysable(config: ModelConfig) -> None:
    """Rejects models without experts, and models whose experts take mixtures of tokens.

    Raises:
        ConfigError: If so.
    """
    layers = config.sparse_layers()
    if not layers:
        raise ConfigError("this model is dense and has no experts to analyse: give a mixture")
    check_separate(layers, "analyse")


def _groups(folder: str | Path, sources: dict[str, str], documents: int) -> dict[str, data.Source]:
    """Returns the documents of each group by its name."""
    try:
        if sources == {UNLABELLED: VALIDATION}:
            return _validation(Path(folder))
        return {name: _documents(name, source, documents) for name, source in sources.items()}
    except FileNotFoundError as error:
        raise ConfigError(f"--corpus: {error}") from error


def _validation(folder: Path) -> dict[str, data.Source]:
    """Returns the validation documents of a run, by the parts of its data."""
    if kind_of(folder) != "run":
        raise ConfigError(
            f"--corpus={VALIDATION} is the validation set of a run, and {folder} is no run: give "
            "files:GLOB"
        )
    parts = workdir.load(folder).data.parts
    return {name: data.texts(part, "eval") for name, part in parts.items()}


def _documents(name: str, source: str, most: int) -> data.Source:
    """Returns all documents of a group, or the validation part of a source without a label."""
    config = data.DataConfig(source=source)
    if name:
        check_directory(config)
        check_files(config)
        return open_all_files(config)
    if source.startswith("hf:"):  # A streamed source is read no further than that.
        config = dataclasses.replace(config, eval_documents=most)
    data.check_source(config)
    return data.open_source(config, "eval")


def _check_earlier(folder: str | Path, steps: Sequence[int], final: Step) -> None:
    """Rejects steps that are no checkpoints, or that come after the ``final`` one.

    Raises:
        ConfigError: If so.
    """
    if not steps:
        return
    if kind_of(folder) != "run":
        raise ConfigError(f"--earlier={steps[0]} is a step of a run, and {folder} is no run")
    kept = sorted(steps_of(Path(folder) / workdir.CHECKPOINTS))
    for step in steps:
        if step not in kept:
            raise ConfigError(
                f"--earlier={step} is no checkpoint of {folder}: choose of "
                f"{', '.join(map(str, kept)) or 'none'}"
            )
    last = step_of(Path(folder), final)
    last = kept[-1] if last is None else last
    late = [step for step in steps if step > last]
    if late:
        raise ConfigError(f"--earlier={late[0]} comes after the analysed step {last}: leave it out")


def _observed(
    opened: FolderModel, texts: list[Text], batch_size: int
) -> tuple[tuple[Observed, ...], list[dict[str, Any]]]:
    """Returns the observed tokens of each stack, and further measures of the experts by layer."""
    with opened.on_mesh():
        found = observe(opened.model, texts, batch_size)
        alike = jax.tree.map(np.asarray, similarities(opened.model, texts, batch_size))
        ahead = foresight(opened.model, texts, found, batch_size)
    named = [{"weights": one.weights, "outputs": one.outputs} for one in alike]
    shown = [{n: finite(x.tolist()) for n, x in one.items()} for one in named]
    pairs = zip(shown, ahead, strict=True)
    return found, [{"similarity": one, "hidden_predicts_next": other} for one, other in pairs]


def _of_group(found: Sequence[Observed], own: np.ndarray) -> tuple[Observed, ...]:
    """Returns the tokens of the documents with ``own (documents,)``, in each stack."""
    return tuple(one.where(own[one.documents]) for one in found)


def _drifts(names: Sequence[str], groups: Sequence[tuple[Observed, ...]]) -> list[dict[str, Any]]:
    """Returns the drift of every further group from the first one."""
    return [
        {"group": name, "reference": names[0], **drift(groups[0], group)}
        for name, group in zip(names[1:], groups[1:], strict=True)
    ]


def _line(opened: FolderModel, found: Sequence[Observed]) -> dict[str, Any]:
    """Returns the evaluation of a group, as far as alarms read it."""
    named = zip(sparse_layers(opened.model), _layers(found), strict=True)
    return {"layers": [{"layer": one.name, **atlas.logged(layer)} for one, layer in named]}


def _layers(found: Sequence[Observed]) -> list[ObservedLayer]:
    return [layer for one in found for layer in one.layers]


def _saturation(
    folder: str | Path, step: int, texts: list[Text], batch_size: int, final: Sequence[Observed]
) -> dict[str, Any]:
    """Returns how much of the routing of an earlier checkpoint the final one keeps.

    Returns:
        The ``step``; by layer the share of the choices that the final checkpoint makes too; and the
        ``drift`` from the earlier to the final checkpoint.
    """
    opened = open_folder(folder, step, require_analysable)
    with opened.on_mesh():
        before = observe(opened.model, texts, batch_size)
    pairs = zip(_layers(before), _layers(final), strict=True)
    shares = [atlas.agreement(one, other) for one, other in pairs]
    return {"step": step, "layers": shares, "drift": drift(before, final)}


def _energy(opened: FolderModel, texts: list[Text], flops_per_joule: float) -> dict[str, Any]:
    target, source = (max(map(len, rows)) for rows in zip(*_rows(texts), strict=True))
    length = Tokens(source, target) if source else Tokens(target)
    cost = counting.count(opened.model.config, opened.vocab_size, length)
    flops = cost.flops_per_token * sum(len(row) for rows in _rows(texts) for row in rows)
    return {
        "kind": "estimate",
        "assumption": f"{flops_per_joule:g} FLOPs per joule, a forward pass, no idle power",
        "flops": flops,
        "joules": flops / flops_per_joule,
        "joules_per_1000_tokens": 1000 * cost.flops_per_token / flops_per_joule,
    }


def _rows(texts: list[Text]) -> list[tuple[Sequence[int], Sequence[int]]]:
    return [(one.tokens, one.source) for one in texts]


def _atlas(opened: FolderModel, found: Sequence[Observed]) -> list[list[dict[str, Any]]]:
    assert opened.tokenizer is not None
    piece = opened.tokenizer.piece
    return [
        [
            atlas.passages(one, layer, expert, piece, most=_MOST_TOKENS)
            for expert in range(layer.num_experts)
        ]
        for one in found
        for layer in one.layers
    ]
