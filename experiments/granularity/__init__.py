"""Ablations of fine-grained experts (Krajewski et al. 2024, 2402.07871)."""
