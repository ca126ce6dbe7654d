"""Converts weights: ``python -m moe_jax.convert --from=hf --input=DIR --output=DIR``, and back.

``--from=moe_jax`` writes a folder that ``transformers`` loads from one that was converted before.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from absl import flags

from moe_jax import cli, signals
from moe_jax.interop import native
from moe_jax.interop.huggingface import Imported, load, save

_FROM = flags.DEFINE_enum("from", "hf", ["hf", "moe_jax"], "What the input is.")
_INPUT = flags.DEFINE_string("input", None, "Folder to read.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write; it must be empty.", required=True)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the parameters.")


def main() -> None:
    """Converts and says what."""
    output = Path(_OUTPUT.value)
    native.require_empty(output)
    with _removed_if_interrupted(output):
        imported = _convert(output)
    print(f"{imported.family} with a vocabulary of {imported.vocab_size} is in {output}")


def _convert(output: Path) -> Imported:
    if _FROM.value == "hf":
        imported = load(_INPUT.value, dtype=_DTYPE.value, progress=True)
        native.save(imported, output)
    else:
        imported = native.load(_INPUT.value)
        save(
            imported.model,
            output,
            imported.family,
            original=imported.original,
            dtype=_DTYPE.value,
            progress=True,
        )
    return imported


@contextlib.contextmanager
def _removed_if_interrupted(output: Path) -> Iterator[None]:
    """Removes what was written to a folder that was empty, so that the same command can start."""
    kept = output.exists()
    try:
        yield
    except signals.Interrupted:
        shutil.rmtree(output, ignore_errors=True)
        if kept:
            output.mkdir(exist_ok=True)
        raise


if __name__ == "__main__":
    cli.run(main)
