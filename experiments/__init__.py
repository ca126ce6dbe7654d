"""Experiments: each file defines an ablation and compares its results with published numbers."""

# Import moe_jax first: a signal during a later import then prints one line, not a traceback.
import moe_jax  # noqa: F401
