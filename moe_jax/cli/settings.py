"""Prints settings: ``moe-jax settings quickstart --word=router``.

The command prints every setting of a config with its value, type, range, default and meaning.
``--word`` selects the settings whose name or meaning has the word. Without ``--config``, the values
are the defaults.
"""

from __future__ import annotations

import textwrap

from absl import flags

from moe_jax.cli import common
from moe_jax.config.experiment import Experiment
from moe_jax.config.reference import Setting, settings_of
from moe_jax.errors import ConfigError

_INDENT = "    "
_WIDTH = 100


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    common.define_config(values)
    flags.DEFINE_string(
        "word", "", "Print only settings whose name or meaning has this word.", flag_values=values
    )


def main(given: flags.FlagValues) -> None:
    """Prints the settings."""
    chosen = given["config"].present or given.override
    experiment = common.experiment_of(given) if chosen else Experiment("defaults")
    word = given.word.lower()
    found = [
        setting
        for setting in settings_of(experiment)
        if word in setting.name.lower() or word in setting.meaning.lower()
    ]
    if not found:
        raise ConfigError(
            f"no setting has --word={given.word!r} in its name or meaning; without --word, the "
            "command prints every setting"
        )
    print("\n".join(map(_shown, found)))


def _shown(setting: Setting) -> str:
    default = "required" if setting.default == "required" else f"default {setting.default}"
    about = f"{setting.kind}; {default}. {setting.meaning}".replace("`", "")
    text = textwrap.fill(about, _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT)
    return f"{setting.name}={setting.value}\n{text}"


if __name__ == "__main__":
    common.run(define, main)
