"""Configurations as plain data, one file per run or published model."""
