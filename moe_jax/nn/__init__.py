"""Flax modules: the mixture-of-experts layer and the other parts of a transformer."""
