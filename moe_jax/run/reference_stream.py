"""Reads the validation documents of a run through its model, for rules of drift."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from moe_jax import data
from moe_jax.analysis.observed import Observed, observe
from moe_jax.errors import ConfigError
from moe_jax.interop.folders import kind_of
from moe_jax.routing import SoftSlots
from moe_jax.run import workdir
from moe_jax.run.corpus import read
from moe_jax.run.opened import FolderModel, open_folder
from moe_jax.training.step_folders import latest_step

# A stream needs enough tokens that its distances are not those of chance.
_DOCUMENTS, _BATCH = 64, 8


def reference_stream(
    reference: str, folder: Path, opened: FolderModel
) -> tuple[Observed, ...] | None:
    """Returns the tokens of a reference and the experts that its model chooses, in each stack.

    Args:
        reference: Workdir of a run; "" for the run in ``folder``.
        folder: Folder of the model that is compared with the reference.
        opened: This model.

    Returns:
        The first 64 validation documents of each part of the reference's data; ``None`` if the kind
        of a drift stays unknown: with several processes, with soft slots, and if the reference has
        another tokenizer, no checkpoint, no run or no text on this machine.
    """
    place = Path(reference) if reference else folder
    if not _is_readable(opened) or kind_of(place) != "run":
        return None
    config = workdir.load(place).data
    if not _is_here(config):
        return None
    theirs = _reference(reference, opened)
    if theirs is None or not _same_ids(theirs, opened, config):
        return None
    return validation_stream(theirs, config)


def validation_stream(opened: FolderModel, config: data.DataConfig) -> tuple[Observed, ...]:
    """Returns the first 64 validation documents of each part of the data, in each stack.

    Args:
        opened: Model that reads the documents.
        config: The data.
    """
    groups = [data.texts(part, "eval") for part in config.parts.values()]
    texts, _, _ = read(opened, groups, _DOCUMENTS, config.seq_length)
    with opened.on_mesh():
        return observe(opened.model, texts, _BATCH)


def _is_here(config: data.DataConfig) -> bool:
    """Returns whether the validation text of the data is on this machine."""
    try:
        for part in config.parts.values():
            data.texts(part, "eval")
    except (FileNotFoundError, ConfigError):
        return False
    return True


def _is_readable(opened: FolderModel) -> bool:
    layers = opened.model.config.sparse_layers()
    soft = any(isinstance(layer.moe.router.select, SoftSlots) for layer in layers)
    return bool(layers) and not soft and jax.process_count() == 1


def _reference(reference: str, opened: FolderModel) -> FolderModel | None:
    if not reference:
        return opened
    if latest_step(Path(reference) / workdir.CHECKPOINTS) is None:
        return None
    return open_folder(reference, None, lambda model: None)


def _same_ids(one: FolderModel, other: FolderModel, config: data.DataConfig) -> bool:
    """Returns whether two tokenizers agree on the first validation document of the data."""
    if one.tokenizer is None or other.tokenizer is None:
        return False
    text = data.texts(next(iter(config.parts.values())), "eval")[0]
    return np.array_equal(one.tokenizer.encode(text), other.tokenizer.encode(text))
