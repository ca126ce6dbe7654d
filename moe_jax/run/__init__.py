"""Trains and opens runs: folder, session, training loop, start weights, results and report."""
