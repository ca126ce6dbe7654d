"""Ablations on synthetic text with known domains and a known entropy."""
