"""Trains a BPE tokenizer: ``moe-jax tokenizer --config=quickstart --output=tokenizers/mine``.

The command trains a byte-level BPE with ``data.vocab_size`` tokens on the training documents of a
config and writes ``tokenizer.json``. ``data.tokenizer=hf:tokenizers/mine`` uses it, and so does
``AutoTokenizer`` of ``transformers``.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from absl import flags

from moe_jax import data, files
from moe_jax.cli import common


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    common.define_config(values)
    flags.DEFINE_string("output", None, "Folder of the new tokenizer.", flag_values=values)
    flags.mark_flag_as_required("output", flag_values=values)


def main(given: flags.FlagValues) -> None:
    """Trains the tokenizer, and prints the bytes per token of the validation documents."""
    config, folder = common.experiment_of(given).data, Path(given.output).expanduser()
    files.check_folder(folder, "--output")
    data.check_bpe(config.vocab_size, folder)
    data.check_source(config)
    data.train_bpe(data.texts(config, "train"), config.vocab_size, folder)
    tokenizer = data.open_tokenizer(dataclasses.replace(config, tokenizer=f"hf:{folder}"))
    texts = data.texts(config, "eval")
    documents = [texts[index] for index in range(len(texts))]
    size = sum(len(text.encode("utf-8")) for text in documents)
    tokens = sum(len(tokenizer.encode(text)) for text in documents)
    print(
        f"{folder}: {tokenizer.vocab_size:,} tokens, {size / max(tokens, 1):.3f} bytes per token "
        f"on validation; use it with --config.data.tokenizer=hf:{folder}"
    )


if __name__ == "__main__":
    common.run(define, main)
