"""Flax modules: the MoE layer and what a transformer needs around it."""
