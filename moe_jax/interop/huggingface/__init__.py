"""Models of ``transformers``: ``load`` reads a folder of ``transformers``, ``save`` writes one."""

from moe_jax.interop.huggingface.convert import Described, Imported, describe, load, save
from moe_jax.interop.huggingface.families import FAMILIES
from moe_jax.interop.huggingface.token_tables import save_token_tables, token_tables

__all__ = [
    "FAMILIES",
    "Described",
    "Imported",
    "describe",
    "load",
    "save",
    "save_token_tables",
    "token_tables",
]
