"""Weights drawn from the names of tensors, so that records need not hold them."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

# Norms of the outputs of layers, in families that have both.
_LAST_NORMS = ("post_feedforward_layernorm.weight", "post_mlp_layernorm.weight")
_OUTPUT_NORMS = ("post_attention_layernorm.weight", *_LAST_NORMS)
_NEAR_ONE = ("weight", "scale", "layer_scalar")
_ENDS = ("embed_tokens", "wte", "shared.weight", "lm_head")


def drawn(name: str, shape: tuple[int, ...], gain: float = 1.0) -> np.ndarray:
    """Returns the tensor of this name: norms near 1, biases near 0, matrices of deviation 0.3.

    ``gain`` multiplies the matrices inside layers.
    """
    noise = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
    if len(shape) == 1:
        return (0.1 * noise + name.endswith(_NEAR_ONE)).astype(np.float32)
    if "gate.weight" in name or "router" in name:
        return noise.astype(np.float32)  # so that few choices are close
    inside = not any(end in name for end in _ENDS)
    return ((0.3 * gain if inside else 0.3) * noise).astype(np.float32)


def write(shapes: dict[str, tuple[int, ...]], folder: Path, gain: float = 1.0) -> None:
    """Writes all tensors into ``model.safetensors``."""
    tensors = {name: drawn(name, tuple(shape), gain) for name, shape in shapes.items()}
    if any(name.endswith(_LAST_NORMS) for name in shapes):
        for name in filter(lambda name: name.endswith(_OUTPUT_NORMS), shapes):
            tensors[name] *= np.float32(gain)  # They undo the gain of the matrices before them.
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
