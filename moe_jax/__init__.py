"""Mixture-of-Experts research in JAX."""
