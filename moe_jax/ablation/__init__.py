"""Ablations: runs, paired statistics, verdicts, figures and reports."""
