"""Ablations of expert choice (Zhou et al. 2022, 2202.09368)."""
