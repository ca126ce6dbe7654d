"""The command lines. No flag is defined when a module is imported."""
