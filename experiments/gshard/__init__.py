"""Ablations of GShard (Lepikhin et al. 2020, 2006.16668)."""
