"""Weights of other codebases, read and written."""
