"""The tokenizer, licences and other files that are copied along with the weights of a model."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path

_NAMES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v*",
    "tokenizer_config.json",
    "tiktoken.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
    "additional_chat_templates",
    "generation_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Patterns of the file names that are copied.

A README is not copied, because it describes the released weights and not the trained ones.
"""


def companions(directory: Path) -> list[Path]:
    """Returns the tokenizer, chat template, generation settings and licences in a folder."""
    if not directory.is_dir():
        return []
    matching = (
        path
        for path in sorted(directory.iterdir())
        if any(fnmatch.fnmatchcase(path.name, name) for name in _NAMES)
    )
    return [path for path in matching if path.exists()]


def copy_companions(source: Path, target: Path) -> None:
    """Copies the companions of ``source`` into ``target``.

    The function creates ``target`` if ``source`` has companions.
    """
    for path in companions(source):
        target.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, target / path.name)
