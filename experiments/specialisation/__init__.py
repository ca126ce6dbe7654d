"""Ablations on text whose domains and best possible loss are known."""
