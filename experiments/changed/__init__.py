"""Ablations of changes of trained models: upcycling, pruning, merging and quantising."""
