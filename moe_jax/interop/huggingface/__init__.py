"""Models of ``transformers``: ``load`` a folder of theirs, ``save`` one that they load."""

from moe_jax.interop.huggingface.convert import (
    FAMILIES,
    Described,
    Imported,
    describe,
    load,
    save,
)

__all__ = ["FAMILIES", "Described", "Imported", "describe", "load", "save"]
