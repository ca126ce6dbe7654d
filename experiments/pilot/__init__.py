"""Pilots, which tune a scale before any ablation uses it."""
