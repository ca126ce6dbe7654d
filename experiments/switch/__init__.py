"""Ablations of Switch Transformer (Fedus et al. 2021, 2101.03961)."""
