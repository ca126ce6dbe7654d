"""Ablations of MegaBlocks (Gale et al. 2022, 2211.15841)."""
