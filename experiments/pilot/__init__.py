"""Ablations of GLaM (Du et al. 2021, 2112.06905)."""
