"""The files that lie beside the weights of a released model and travel with them."""

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
"""A README stays behind: it describes the released weights, and not those after training."""


def companions(directory: Path) -> list[Path]:
    """Returns tokenizer, chat template, generation settings and licences of a folder."""
    if not directory.is_dir():
        return []
    found = (
        path
        for path in sorted(directory.iterdir())
        if any(fnmatch.fnmatchcase(path.name, name) for name in _NAMES)
    )
    return [path for path in found if path.exists()]


def copy_companions(source: Path, target: Path) -> None:
    """Copies them into ``target``, which is made if there are any."""
    for path in companions(source):
        target.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, target / path.name)
