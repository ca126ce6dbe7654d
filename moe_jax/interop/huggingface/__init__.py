"""Models of ``transformers``: ``load`` reads a folder of ``transformers``, ``save`` writes one."""

from moe_jax.interop.huggingface.convert import (
    FAMILIES,
    Described,
    Imported,
    describe,
    load,
    save,
)

__all__ = ["FAMILIES", "Described", "Imported", "describe", "load", "save"]
