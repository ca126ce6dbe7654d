"""Experiments: each a command that writes its results beside what was published."""

# First: from here on a signal ends an import with one line.
import moe_jax  # noqa: F401
