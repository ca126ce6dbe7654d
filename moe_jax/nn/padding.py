"""Padding: every mask ``valid`` is True for a token and False for padding."""

from __future__ import annotations

from jaxtyping import Array, Bool, Int


def valid_tokens(segments: Int[Array, "*B L"]) -> Bool[Array, "*B L"]:
    """Returns the mask of tokens; segment 0 is padding.

    Args:
        segments: Segment ``(B, L)`` of each token, int32.
    """
    return segments > 0
