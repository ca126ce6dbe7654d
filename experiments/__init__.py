"""Experiments: each file defines an ablation and compares its results with published numbers."""

# This import comes first: afterwards, a signal during an import ends with one line.
import moe_jax  # noqa: F401
