"""Command lines, one module each. The import of a module defines no flag."""
