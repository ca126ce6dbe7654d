"""A TFDS dataset of the running interpreter's own standard library."""

from moe_jax.data.python_library.python_library_dataset_builder import (
    Builder,
    PythonLibraryConfig,
)

__all__ = ["Builder", "PythonLibraryConfig"]
