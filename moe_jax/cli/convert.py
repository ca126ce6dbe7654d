"""Converts weights: ``moe-jax convert --from=hf --input=DIR --output=DIR``, and back.

``--from=hf`` reads a model of ``transformers`` and writes a converted model. ``--from=moe_jax``
reads a converted model or the workdir of a run and writes a model that ``transformers`` loads. Both
copy tokenizer, chat template, generation settings and licences of the released model.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from moe_jax import signals
from moe_jax.cli import common
from moe_jax.errors import ConfigError
from moe_jax.interop import folders, native
from moe_jax.interop.huggingface import FAMILIES, Imported, load, save
from moe_jax.quantised.packed import PackedFile, note_of, recorded_note
from moe_jax.run.exported import checkpoint_of, open_trained, tokenizer_texts

_NAMES = {"hf": "a released model", "moe_jax": "a converted model", "run": "a run"}


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_enum(
        "from",
        "hf",
        ["hf", "moe_jax"],
        "Input: a model of transformers (hf), or a converted model or a run (moe_jax).",
        flag_values=values,
    )
    common.define_step(values)
    common.define_average(values)
    flags.DEFINE_string("input", None, "Folder to read.", required=True, flag_values=values)
    flags.DEFINE_string(
        "output", None, "Empty or new folder to write.", required=True, flag_values=values
    )
    flags.DEFINE_enum(
        "dtype",
        "float32",
        ["float32", "bfloat16"],
        "Data type of the parameters.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "family",
        None,
        sorted(FAMILIES),
        "Family to write with --from=moe_jax; by default the family of the input.",
        flag_values=values,
    )


def main(given: flags.FlagValues) -> None:
    """Converts the input and prints its family."""
    signals.advise(f"nothing is left in {given.output}; run the same command to start again")
    _convert(given, Path(given.input), Path(given.output))


def _convert(given: flags.FlagValues, source: Path, output: Path) -> None:
    _check_input(given, source)
    native.require_empty(output)
    if given["from"].value == "hf":
        imported = load(source, dtype=given.dtype, progress=True)
        native.save(imported, output, source, texts=recorded_note(source))
    else:
        imported = _opened(given, source)
        save(
            imported.model,
            output,
            given.family or imported.family,
            original=imported.original,
            companions=folders.companions_of(source),
            texts=tokenizer_texts(source) | _note(given, source),
            dtype=given.dtype,
            progress=True,
        )
    name = given.family or imported.family
    print(f"{name} with a vocabulary of {imported.vocab_size} is in {output}")


def _note(given: flags.FlagValues, source: Path) -> dict[str, str]:
    """Returns the file, by name, that says that the weights are those of codes."""
    run = folders.kind_of(source) == "run"
    codes = PackedFile(checkpoint_of(source, given.step) if run else source)
    return recorded_note(source) | note_of(codes.summary())


def _opened(given: flags.FlagValues, source: Path) -> Imported:
    if folders.kind_of(source) == "run":
        return open_trained(source, given.family or "", given.step, average=given.average)
    return native.load(source)


def _check_input(given: flags.FlagValues, source: Path) -> None:
    """Rejects an input folder whose kind differs from ``--from``.

    Raises:
        ConfigError: If the folder is missing, empty or of another kind, or if ``--family`` is set
            with ``--from=hf``, or ``--step`` or ``--noaverage`` without a run.
    """
    if not source.is_dir():
        raise ConfigError(f"--input={source} is not a folder")
    kind = folders.kind_of(source)
    if kind == "none":
        raise ConfigError(
            f"--input={source} holds no released model, no converted model and no run"
        )
    other = "hf" if kind == "hf" else "moe_jax"
    if other != given["from"].value:
        raise ConfigError(f"--input={source} is {_NAMES[kind]}: use --from={other}")
    if given["from"].value == "hf" and given.family:
        raise ConfigError("--family has an effect only with --from=moe_jax: leave it out")
    if given.step is not None and kind != "run":
        raise ConfigError(f"--step selects a checkpoint of a run, and {source} is {_NAMES[kind]}")
    if not given.average and kind != "run":
        raise ConfigError(
            f"--noaverage selects parameters of a run, and {source} is {_NAMES[kind]}"
        )


if __name__ == "__main__":
    common.run(define, main)
