"""Runs over a grid of settings, or over settings that a sampler draws, and their comparison."""
