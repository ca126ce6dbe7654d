"""Training of a byte-level BPE tokenizer, in the files of a released one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from moe_jax.data.directory import write_parts
from moe_jax.data.hf_tokenizer import library
from moe_jax.data.sample import SAMPLED_BYTES, even_sample
from moe_jax.data.source import Source
from moe_jax.errors import ConfigError

_SPECIALS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
_SMALLEST = len(_SPECIALS) + 256


def check_bpe(vocab_size: int, folder: str | Path) -> None:
    """Rejects a vocabulary that is too small, and a folder that holds a tokenizer.

    Raises:
        ConfigError: If so, or if the package ``tokenizers`` is missing.
    """
    library()
    if vocab_size < _SMALLEST:
        raise ConfigError(
            f"data.vocab_size={vocab_size} is too small: bytes and special tokens need {_SMALLEST}"
        )
    path = Path(folder) / "tokenizer.json"
    if path.exists():
        raise ConfigError(f"{path} exists: delete it, or use another folder")


def train_bpe(source: Source, vocab_size: int, folder: str | Path) -> None:
    """Trains a byte-level BPE (Radford et al., 2019) and writes it as ``hf:FOLDER`` reads it.

    Args:
        source: Training documents; training uses an even sample of about 16 MB of a larger corpus.
        vocab_size: Number of tokens, the 256 bytes and three special tokens included; a small
            corpus may have fewer pairs to merge.
        folder: Folder for ``tokenizer.json`` and ``tokenizer_config.json``.

    Raises:
        ConfigError: See ``check_bpe``; or the folder cannot be written.
    """
    check_bpe(vocab_size, folder)
    kinds = library()
    tokenizer = kinds.Tokenizer(kinds.models.BPE())
    tokenizer.pre_tokenizer = kinds.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = kinds.decoders.ByteLevel()
    trainer = kinds.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIALS.values()),
        initial_alphabet=sorted(kinds.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_limited(source), trainer)
    about = {"tokenizer_class": "PreTrainedTokenizerFast", **_SPECIALS}
    target = tfds.core.Path(folder)
    write_parts(target / "tokenizer_config.json", [json.dumps(about, indent=2).encode()])
    write_parts(target / "tokenizer.json", [tokenizer.to_str(pretty=True).encode("utf-8")])


def _limited(source: Source) -> Iterator[str]:
    left = 2 * SAMPLED_BYTES
    for text in even_sample(source):
        yield text[:left]
        left = max(0, left - len(text))
