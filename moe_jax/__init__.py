"""Mixture-of-Experts research in JAX."""

import sys

from moe_jax import signals

# So it is while ``python -m moe_jax.train`` imports the packages of that module.
if sys.argv[:1] == ["-m"]:
    signals.end_imports()
