"""Merges LoRA adapters: ``moe-jax merge_adapters --input=runs/adapted --output=runs/merged``."""

from __future__ import annotations

from absl import flags

from moe_jax.cli import changed_models, common
from moe_jax.surgery.adapters import merge_adapters


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    changed_models.define_folders(values)


def main(given: flags.FlagValues) -> None:
    """Writes the run without adapters."""
    common.say(str(merge_adapters(**changed_models.folders_of(given))))


if __name__ == "__main__":
    common.run(define, main)
