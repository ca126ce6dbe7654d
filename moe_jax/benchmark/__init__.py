"""Benchmarks of one layer: shapes, given routing, candidates, checks, timing and tables."""
