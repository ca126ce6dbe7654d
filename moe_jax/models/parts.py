"""Parts and layers of a model to which an array belongs, by its name."""

from __future__ import annotations

import re

# The first pattern that a name matches determines the part.
_PARTS = {
    "router": r"/router/",
    "experts": r"/(experts|free)/",
    "shared": r"/shared/",
    "norms": r"norm/|norm$|/output_scale$",
    "attention": r"/(attention|attention_experts|cross|\w+_bias)/",
    "latent": r"/latent/",
    "dense": r"/(feed_forward|extra)/",
    "head": r"/embedding/head$",
    "embedding": r"/embedding/",
    "lookahead": r"/lookahead/",
}
_LAYER = re.compile(r"[a-z_]+/((\w+)/\d+)/")


def groups_of(name: str) -> tuple[str, ...]:
    """Returns the groups of one array: its part, and its stack and layer if it has one.

    Args:
        name: Name of a layer's array, as in ``moe_jax.models.places``.

    Examples:
        >>> from moe_jax.models.parts import groups_of
        >>> groups_of("params/layers/0/feed_forward/experts/up")
        ('experts', 'layers', 'layers/0', 'layers/0/experts')
    """
    part = next(part for part, pattern in _PARTS.items() if re.search(pattern, name))
    layer = _LAYER.match(name)
    return (part, layer[2], layer[1], f"{layer[1]}/{part}") if layer else (part,)
