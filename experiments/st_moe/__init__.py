"""Ablations of ST-MoE (Zoph et al. 2022, 2202.08906)."""
