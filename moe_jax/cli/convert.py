"""Converts weights: ``python -m moe_jax.convert --from=hf --input=DIR --output=DIR``, and back.

``--from=moe_jax`` writes a folder that ``transformers`` loads, from one that was converted before
or from the workdir of a run. Tokenizer, chat template, generation settings and licences of the
released model travel along.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from moe_jax import signals
from moe_jax.cli import common
from moe_jax.errors import ConfigError
from moe_jax.interop import folders, native
from moe_jax.interop.huggingface import FAMILIES, Imported, load, save
from moe_jax.run.exported import open_trained

_FROM = flags.DEFINE_enum("from", "hf", ["hf", "moe_jax"], "What the input is.")
_INPUT = flags.DEFINE_string("input", None, "Folder to read.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write; it must be empty.", required=True)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the parameters.")
_FAMILY = flags.DEFINE_enum(
    "family", None, sorted(FAMILIES), "Written with --from=moe_jax, if not that of the input."
)
_NAMES = {"hf": "a released model", "moe_jax": "a converted model", "run": "a run"}


def main() -> None:
    """Converts and says what."""
    signals.advise(f"nothing is left in {_OUTPUT.value}; run the same command to start again")
    _convert(Path(_INPUT.value), Path(_OUTPUT.value))


def _convert(source: Path, output: Path) -> None:
    _check_input(source)
    native.require_empty(output)
    if _FROM.value == "hf":
        imported = load(source, dtype=_DTYPE.value, progress=True)
        native.save(imported, output, source)
    else:
        imported = _opened(source)
        save(
            imported.model,
            output,
            _FAMILY.value or imported.family,
            original=imported.original,
            companions=folders.companions_of(source),
            dtype=_DTYPE.value,
            progress=True,
        )
    name = _FAMILY.value or imported.family
    print(f"{name} with a vocabulary of {imported.vocab_size} is in {output}")


def _opened(source: Path) -> Imported:
    if folders.kind_of(source) == "run":
        return open_trained(source, _FAMILY.value or "")
    return native.load(source)


def _check_input(source: Path) -> None:
    """Refuses a folder of another kind than ``--from`` says.

    Raises:
        ConfigError: naming the kind.
    """
    if not source.is_dir():
        raise ConfigError(f"--input={source} is not a folder")
    kind = folders.kind_of(source)
    if kind == "none":
        raise ConfigError(f"--input={source} holds no released model, no converted one and no run")
    other = "hf" if kind == "hf" else "moe_jax"
    if other != _FROM.value:
        raise ConfigError(f"--input={source} is {_NAMES[kind]}: use --from={other}")
    if _FROM.value == "hf" and _FAMILY.value:
        raise ConfigError("--family is of what --from=moe_jax writes: leave it out")


if __name__ == "__main__":
    common.run(main)
