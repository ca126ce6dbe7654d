"""Tells a folder with a released model from a converted model and from a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from moe_jax.interop import huggingface, native
from moe_jax.interop.companions import companions

Kind = Literal["hf", "moe_jax", "run", "none"]


def kind_of(folder: Path | str) -> Kind:
    """Returns the kind of a folder.

    The kinds are a model of ``transformers`` (``hf``), a converted model (``moe_jax``), a run
    (``run``) and any other folder (``none``).
    """
    folder = Path(folder)
    if (folder / native.DESCRIPTION).exists() or (folder / native.PARAMETERS).exists():
        return "moe_jax"
    if not (folder / "config.json").is_file():
        return "none"
    try:
        content = json.loads((folder / "config.json").read_text())
    except ValueError:
        return "none"
    return "run" if isinstance(content, dict) and "config" in content else "hf"


def describe(folder: Path | str) -> huggingface.Described:
    """Describes a released or a converted model without reading its weights.

    Raises:
        ConfigError: If the folder holds no model, or an incomplete one.
    """
    if kind_of(folder) != "moe_jax":
        return huggingface.describe(folder)
    saved = native.describes(folder)
    config = native.config_of(saved)
    return huggingface.Described(config, saved["vocab_size"], saved["family"], saved["original"])


def companions_of(folder: Path | str) -> Path:
    """Returns the folder that holds the tokenizer and the licences of a model or run."""
    folder = Path(folder)
    beside = folder / native.BESIDE
    return beside if kind_of(folder) in ("moe_jax", "run") else folder


def tokenizer_of(folder: Path | str) -> str:
    """Returns ``hf:FOLDER`` for the tokenizer of a released or converted model, or ``""``."""
    directory = companions_of(folder)
    names = {path.name for path in companions(directory)}
    vocabularies = ("tokenizer.json", "tokenizer.model", "spiece.model")
    return f"hf:{directory}" if names.intersection(vocabularies) else ""
