"""Writes tables of experts by token id: ``moe-jax tables --input=DIR --output=tables``.

The first MoE layers of DeepSeek-V4 choose experts by tables of token ids (``tid2eid``). The command
reads them from the safetensors files of the released model and writes a NumPy file per layer, which
the choice ``table`` of the router ``deepseek_v4_hash`` names.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from absl import flags

from moe_jax import files
from moe_jax.cli import common
from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface import save_token_tables


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string(
        "input", None, "Folder of the released model.", required=True, flag_values=values
    )
    flags.DEFINE_string("output", None, "Folder to write.", required=True, flag_values=values)


def main(given: flags.FlagValues) -> None:
    """Writes the files and prints the name and shape of each."""
    folder = Path(given.input).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"--input={given.input} is not a folder")
    output = Path(given.output).expanduser()
    files.check_folder(output, "--output")
    for layer, path in save_token_tables(folder, output).items():
        ids, choices = np.load(path, mmap_mode="r").shape
        print(f"layer {layer}: {path} has {choices} experts for each of {ids:,} token ids")


if __name__ == "__main__":
    common.run(define, main)
