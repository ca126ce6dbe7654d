"""Stores of small experts, each of which is known by its values."""

import numpy as np

from moe_jax.errors import ConfigError
from moe_jax.offload import HostStore


def named(layer, expert, size=2):
    """An expert of ``4 * size`` bytes, whose values tell its layer and number."""
    return {"up": np.full(size, 100 * layer + expert, np.float32)}


def store(*experts, size=2):
    """A store of MoE layers with the given numbers of experts, of 8 bytes each."""
    return HostStore([[named(i, e, size) for e in range(n)] for i, n in enumerate(experts)])


class Broken(HostStore):
    """A store that cannot read expert 1 of any layer."""

    def read(self, expert):
        if expert[1] == 1:
            raise ConfigError(f"expert {expert} is cut short: write it again")
        return super().read(expert)

    def nbytes(self, expert):
        return 8
