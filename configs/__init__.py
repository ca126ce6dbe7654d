"""Configurations: plain data, one file per experiment."""
