"""Experts that are a fixed function of the token id: hash functions and tables."""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32, UInt32

from moe_jax.errors import ConfigError
from moe_jax.ranges import Seed
from moe_jax.routing.inputs import Inputs, Scored
from moe_jax.routing.select.rank import Rank


@dataclasses.dataclass(frozen=True)
class ByToken(Rank):
    """A ranking of the experts that depends on the token id alone; gates remain learned scores.

    The first layers of DeepSeek-V4 read a token's experts from a frozen table of token ids. This
    rank hashes the id with each expert, which gives a random table, or reads a table from a file.

    Attributes:
        seed: Seed of the hash.
        table: NumPy file with the experts ``(V, K)`` of each id (``tid2eid``), best first, which
            ``moe-jax tables`` writes from a released model; an empty name selects the hash.
    """

    seed: Seed = 0
    table: str = ""

    def check(self, num_experts: int) -> None:
        """Raises ``ConfigError`` if the file has no table of experts below ``num_experts``."""
        if self.table:
            token_table(self.table, num_experts)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ``ConfigError`` if the table lacks ids below ``vocab_size``."""
        if self.table and len(_loaded(self.table)) < vocab_size:
            raise ConfigError(
                f"the router's table {self.table} has fewer rows than the tokenizer has ids, "
                f"{vocab_size}: write a row of experts for every id"
            )

    def __call__(self, scored: Scored, inputs: Inputs) -> Float[Array, "S E"]:
        """Returns the ranking of the experts of each token's id."""
        ids = inputs.needs_token_ids("ByToken")
        dtype, num_experts = scored.scores.dtype, scored.scores.shape[1]
        expert = jnp.arange(num_experts)
        if not self.table:
            pairs = ids.astype(jnp.uint32)[:, None] * num_experts + expert.astype(jnp.uint32)
            # Float32 holds 24 bits of the hash.
            return (hashed(pairs, self.seed) >> 8).astype(dtype)
        listed = jnp.asarray(token_table(self.table, num_experts))[ids]
        found = listed[..., None] == expert
        return jnp.where(found.any(1), -jnp.argmax(found, axis=1), -jnp.inf).astype(dtype)


def hashed(ids: Int[Array, "*S"] | UInt32[Array, "*S"], seed: int) -> UInt32[Array, "*S"]:
    """Returns the 32-bit finaliser of MurmurHash3 on the ids."""
    h = ids.astype(jnp.uint32) ^ jnp.uint32(seed * 0x9E3779B9 & 0xFFFFFFFF)
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def token_table(path: str, num_experts: int) -> Int32[np.ndarray, "V K"]:
    """Returns the experts ``(V, K)`` of each token id from a NumPy file.

    Raises:
        ConfigError: If the file cannot be read or has other content.
    """
    table = _loaded(path)
    if table.ndim != 2 or table.min() < 0 or table.max() >= num_experts:
        raise ConfigError(
            f"the router's table {path} must have one row of experts, from 0 to {num_experts - 1}, "
            "per token id: write such an array with numpy.save"
        )
    return table


@functools.cache
def _loaded(path: str) -> Int32[np.ndarray, "V K"]:
    try:
        return np.load(path).astype(np.int32)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot read the router's table {path}: write it with numpy.save"
        ) from error
