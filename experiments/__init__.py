"""Experiments: each a command that writes its results beside what was published."""
