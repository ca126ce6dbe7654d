"""Ablations of changes of trained models, and of settings that change during training."""
