"""Padding: everywhere, ``valid`` is True for a token and False for padding."""

from __future__ import annotations

import jax

Array = jax.Array


def valid_tokens(segments: Array) -> Array:
    """Returns which entries of ``segments (B, L)`` int32 are tokens; segment 0 is padding."""
    return segments > 0
