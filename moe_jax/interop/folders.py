"""What a folder with a model is: a released model, a converted one or a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from moe_jax.interop import huggingface, native
from moe_jax.interop.companions import companions

Kind = Literal["hf", "moe_jax", "run", "none"]


def kind_of(folder: Path | str) -> Kind:
    """Returns whether a folder is of ``transformers``, converted (``moe_jax``) or a run."""
    folder = Path(folder)
    if (folder / native.DESCRIPTION).exists() or (folder / native.PARAMETERS).exists():
        return "moe_jax"
    if not (folder / "config.json").is_file():
        return "none"
    try:
        found = json.loads((folder / "config.json").read_text())
    except ValueError:
        return "none"
    return "run" if isinstance(found, dict) and "config" in found else "hf"


def describe(folder: Path | str) -> huggingface.Described:
    """Describes a released or a converted model without reading its weights.

    Raises:
        ConfigError: if the folder holds neither, or only a part of one.
    """
    if kind_of(folder) != "moe_jax":
        return huggingface.describe(folder)
    found = native.describes(folder)
    config = native.config_of(found)
    return huggingface.Described(config, found["vocab_size"], found["family"], found["original"])


def companions_of(folder: Path | str) -> Path:
    """Returns the folder in which tokenizer and licences of a model or run lie."""
    folder = Path(folder)
    beside = folder / native.BESIDE
    return beside if kind_of(folder) in ("moe_jax", "run") else folder


def tokenizer_of(folder: Path | str) -> str:
    """Returns ``hf:FOLDER`` for the tokenizer of a released or converted model, or ``""``."""
    place = companions_of(folder)
    names = {path.name for path in companions(place)}
    vocabularies = ("tokenizer.json", "tokenizer.model", "spiece.model")
    return f"hf:{place}" if names.intersection(vocabularies) else ""
