"""Compares two models of one configuration on a text: their logits and their losses."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from moe_jax.errors import ConfigError
from moe_jax.nn.mode import DECODE
from moe_jax.surgery.evidence import Batch
from moe_jax.surgery.weights import LayerWeights
from moe_jax.training.step import predicted_tokens


@dataclasses.dataclass(frozen=True)
class ModelDifference:
    """The difference of two models on a text.

    Attributes:
        logits_error: Root of the mean squared difference of the logits, divided by the root of the
            mean squared logits of the first model.
        bits_per_byte: Bits per byte of the two models.
    """

    logits_error: float
    bits_per_byte: tuple[float, float]

    def __str__(self) -> str:
        before, after = self.bits_per_byte
        return (
            f"relative error of the logits {self.logits_error:.2e}, "
            f"bits per byte {after:.4f} (before: {before:.4f})"
        )


def compare(
    one: LayerWeights,
    other: LayerWeights,
    batches: Iterable[Batch],
    byte_lengths: Int[np.ndarray, " V"],
) -> ModelDifference:
    """Returns the difference of two models on a stream; no token is dropped.

    Args:
        one: The first model.
        other: A model of the same configuration.
        batches: Batches of ``moe_jax.data``.
        byte_lengths: Number ``(V,)`` of bytes of each token id.

    Raises:
        ConfigError: If there is no batch.
    """
    graph, first = nnx.split(one.module())
    second = nnx.split(other.module())[1]
    lengths = jnp.asarray(byte_lengths)
    sums = [np.asarray(_sums(graph, first, second, lengths, b), np.float64) for b in batches]
    if not sums:
        raise ConfigError("the stream has no batch: give a longer text")
    squared, square, before, after, size = np.sum(sums, axis=0)
    bits = np.log(2) * max(size, 1)
    return ModelDifference(
        float(np.sqrt(squared / max(square, np.finfo(np.float64).tiny))),
        (float(before / bits), float(after / bits)),
    )


@functools.partial(jax.jit, static_argnums=0)
def _sums(
    graph: nnx.GraphDef, first: nnx.State, second: nnx.State, lengths: Array, batch: Batch
) -> Array:
    """Returns squared differences, squared logits, both losses in nats, and bytes."""
    models = [nnx.merge(graph, state) for state in (first, second)]
    hidden = [model.read(batch, mode=DECODE).hidden for model in models]
    valid = predicted_tokens(batch)

    def of_row(row: tuple[Array, Array, Array, Array]) -> Array:
        *states, targets, held = row
        logits = [
            model.logits(state[None])[0].astype(jnp.float32)
            for model, state in zip(models, states, strict=True)
        ]
        chosen = [jnp.take_along_axis(of, targets[:, None], -1)[:, 0] for of in logits]
        losses = [jax.nn.logsumexp(of, axis=-1) - at for of, at in zip(logits, chosen, strict=True)]
        each = (
            jnp.square(logits[1] - logits[0]).sum(-1),
            jnp.square(logits[0]).sum(-1),
            *losses,
            jnp.take(lengths, targets, axis=0),
        )
        return jnp.stack([(value * held).sum() for value in each])

    return jax.lax.map(of_row, (*hidden, batch["targets"], valid)).sum(0)
