"""Flags of the commands that write a changed model: input, output, text and settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from absl import flags

from moe_jax import signals
from moe_jax.cli import common
from moe_jax.config.loading import values_of_texts
from moe_jax.errors import ConfigError
from moe_jax.interop import folders
from moe_jax.interop.huggingface import FAMILIES
from moe_jax.run import workdir
from moe_jax.surgery.mixture import LayerName


def define_folders(values: flags.FlagValues) -> None:
    """Defines ``--input``, ``--output``, ``--step``, ``--family`` and ``--config.NAME``."""
    flags.DEFINE_string(
        "input",
        None,
        "Workdir of a run, or folder of a released or converted model.",
        required=True,
        flag_values=values,
    )
    flags.DEFINE_string(
        "output", None, "Empty or new folder to write.", required=True, flag_values=values
    )
    flags.DEFINE_enum(
        "family",
        None,
        sorted(FAMILIES),
        "Family of the output, if the input is no run; by default a family that fits.",
        flag_values=values,
    )
    common.define_step(values)
    common.define_overrides(values)


def define_text(values: flags.FlagValues) -> None:
    """Defines ``--file`` and ``--batches``, the text on which experts are measured."""
    flags.DEFINE_string(
        "file",
        "",
        "Text file, or .jsonl file with a text in each line, on which experts are measured; by "
        "default the validation set of a run.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "batches",
        8,
        "Largest number of batches of the text.",
        lower_bound=1,
        flag_values=values,
    )


def text_of(given: flags.FlagValues) -> dict[str, Any]:
    """Returns the arguments of ``define_text`` for ``moe_jax.surgery.api``."""
    return {"file": given.file, "batches": given.batches}


def folders_of(given: flags.FlagValues) -> dict[str, Any]:
    """Returns the arguments of ``define_folders`` for ``moe_jax.surgery.api``.

    Raises:
        ConfigError: If a setting is given for a model that is no run, or is unknown.
    """
    signals.advise(f"nothing is left in {given.output}; run the same command to start again")
    texts, source = common.texts_of(given), Path(given.input)
    if texts and folders.kind_of(source) != "run":
        raise ConfigError(f"{source} is no run and has no settings: leave out --config.NAME")
    return {
        "source": source,
        "output": given.output,
        "step": given.step,
        "family": given.family or "",
        "overrides": values_of_texts(workdir.load(source), texts) if texts else None,
    }


def define_optimizer(values: flags.FlagValues) -> None:
    """Defines ``--optimizer``."""
    flags.DEFINE_enum(
        "optimizer",
        "new",
        ["new", "keep"],
        "Start a run at step 0 with a new optimizer, or go on at the step of the checkpoint with "
        "the state of its optimizer.",
        flag_values=values,
    )


def define_lookahead(values: flags.FlagValues) -> None:
    """Defines ``--drop_lookahead``."""
    flags.DEFINE_boolean(
        "drop_lookahead",
        False,
        "Leave out the modules that predict tokens further ahead (model.lookahead).",
        flag_values=values,
    )


def define_other(values: flags.FlagValues) -> None:
    """Defines ``--other`` and ``--other_step``, a second model."""
    flags.DEFINE_string(
        "other",
        None,
        "Workdir or folder of a model with experts of the same shapes.",
        required=True,
        flag_values=values,
    )
    common.define_step(values, "other_step")


def define_layers(values: flags.FlagValues) -> None:
    """Defines ``--layers``."""
    flags.DEFINE_list(
        "layers",
        [],
        "Indices of layers, or names such as 'encoder 1'; an index alone means this layer of each "
        "stack. By default all.",
        flag_values=values,
    )


def layers_of(given: flags.FlagValues) -> list[LayerName]:
    """Returns the layers of ``define_layers``, by index or by name.

    Raises:
        ConfigError: If a part is neither.
    """
    texts: list[str] = given["layers"].value or []
    if not all(re.fullmatch(r"((encoder|decoder) )?[0-9]+", text) for text in texts):
        raise ConfigError(
            f"--layers={','.join(texts)} is no list of layers such as 1,3 or 'encoder 1,decoder 1'"
        )
    return [int(text) if text.isdigit() else text for text in texts]


def numbers(given: flags.FlagValues, name: str) -> list[int]:
    """Returns the numbers of a flag such as ``--copy=1,3``.

    Raises:
        ConfigError: If a part is no number.
    """
    texts: list[str] = given[name].value or []
    if not all(text.isdigit() for text in texts):
        raise ConfigError(f"--{name}={','.join(texts)} is no list of numbers such as 1,3")
    return [int(text) for text in texts]
