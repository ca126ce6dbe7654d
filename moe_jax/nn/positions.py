"""How a model knows where a token stands: rotations, a learned bias, or added vectors."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.errors import ConfigError
from moe_jax.nn.init import weight
from moe_jax.ranges import Factor, Growth, Natural, NonNegative, Positive, Range, Ranged

Array = jax.Array
RotaryBase = Annotated[float, Range(1, 1e12, above=True)]
# An encoder halves the table for the two directions, and half of each half is exact.
Buckets = Annotated[int, Range(4, 2**20)]


@dataclasses.dataclass(frozen=True)
class LinearScaling(Ranged):
    """Positions divided by ``factor`` (Chen et al. 2023, 2306.15595)."""

    factor: Growth = 1.0

    def frequencies(self, plain: Array, base: float) -> Array:
        """Returns the scaled frequencies ``(D / 2,)``."""
        del base
        return plain / self.factor

    @property
    def magnitude(self) -> float:
        """What sine and cosine are multiplied by."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class Llama3Scaling(Ranged):
    """Long wavelengths divided by ``factor``, short ones kept (Llama 3, 2407.21783).

    Attributes:
        factor: of the longest.
        low: wavelengths above ``original_length / low`` are divided.
        high: wavelengths below ``original_length / high`` are kept; between is a ramp, or a step
            where both are equal (Llama 4 Scout).
        original_length: tokens that the model was trained on first.
    """

    factor: Growth = 8.0
    low: Factor = 1.0
    high: Factor = 4.0
    original_length: Positive = 8192

    def __post_init__(self):
        super().__post_init__()
        if self.high < self.low:
            raise ConfigError(
                f"Llama3Scaling.high={self.high} must be at least Llama3Scaling.low={self.low}"
            )

    def frequencies(self, plain: Array, base: float) -> Array:
        """Returns the scaled frequencies ``(D / 2,)``."""
        del base
        turns = self.original_length * plain / (2 * math.pi)
        if self.high == self.low:
            return jnp.where(turns < self.low, plain / self.factor, plain)
        kept = jnp.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0)
        return plain * (kept + (1 - kept) / self.factor)

    @property
    def magnitude(self) -> float:
        """What sine and cosine are multiplied by."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class YarnScaling(Ranged):
    """YaRN (Peng et al. 2023, 2309.00071, section 3): a ramp over the features.

    Attributes:
        factor: of the features that turn least.
        original_length: tokens that the model was trained on first.
        beta_fast: features with more turns over the original length are kept.
        beta_slow: features with fewer turns are divided by ``factor``.
        truncate: round the ends of the ramp to whole features.
        attention_factor: of sine and cosine; 0 for ``0.1 log(factor) + 1``.
    """

    factor: Growth = 1.0
    original_length: Positive = 4096
    beta_fast: Factor = 32.0
    beta_slow: Factor = 1.0
    truncate: bool = True
    attention_factor: NonNegative = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.beta_fast <= self.beta_slow:
            raise ConfigError(
                f"YarnScaling.beta_fast={self.beta_fast} must be above "
                f"YarnScaling.beta_slow={self.beta_slow}"
            )

    def frequencies(self, plain: Array, base: float) -> Array:
        """Returns the scaled frequencies ``(D / 2,)``."""
        half = plain.shape[0]

        def feature(turns: float) -> float:
            return half * math.log(self.original_length / (turns * 2 * math.pi)) / math.log(base)

        low, high = feature(self.beta_fast), feature(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        ramp = jnp.clip((jnp.arange(half) - low) / max(high - low, 1e-3), 0.0, 1.0)
        return plain * (1 - ramp + ramp / self.factor)

    @property
    def magnitude(self) -> float:
        """What sine and cosine are multiplied by."""
        return self.attention_factor or 0.1 * math.log(max(self.factor, 1.0)) + 1.0


@dataclasses.dataclass(frozen=True)
class Rotary(Ranged):
    """Queries and keys rotated by position (Su et al. 2021, 2104.09864).

    Attributes:
        base: the slowest wavelength is ``2 * pi * base``.
        interleaved: features ``2i, 2i+1`` are a pair, instead of ``i, i + D/2``.
        scaling: of the frequencies, for texts longer than the first ones; ``None`` for none.
    """

    base: RotaryBase = 10000.0
    interleaved: bool = False
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None


@dataclasses.dataclass(frozen=True)
class T5Relative(Ranged):
    """T5's learned bias by distance, one table for all layers of a stack (1910.10683).

    Attributes:
        buckets: rows of the table.
        max_distance: from which on all distances share a row.
    """

    buckets: Buckets = 32
    max_distance: Positive = 128


@dataclasses.dataclass(frozen=True)
class Learned(Ranged):
    """A learned vector per position, added to the embedding.

    Attributes:
        length: positions there are.
        offset: rows before that of position 0.
    """

    length: Positive = 1024
    offset: Natural = 0


@dataclasses.dataclass(frozen=True)
class Sinusoidal(Ranged):
    """Fixed sines, then cosines, added to the embedding (1706.03762, as fairseq lays them out).

    Attributes:
        offset: added to positions; fairseq starts after its padding index, at 2.
    """

    offset: Natural = 2


@dataclasses.dataclass(frozen=True)
class NoPositions(Ranged):
    """None but the order that causality gives."""


Positions = Rotary | T5Relative | Learned | Sinusoidal | NoPositions


def rotate(x: Array, positions: Array, rotary: Rotary) -> Array:
    """Rotates ``x (B, H, L, D)`` by ``positions (B, L)``."""
    dim = x.shape[-1]
    frequency = rotary.base ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    magnitude = 1.0
    if rotary.scaling is not None:
        frequency = rotary.scaling.frequencies(frequency, rotary.base)
        magnitude = rotary.scaling.magnitude
    angle = positions[:, None, :, None] * frequency
    sin, cos = jnp.sin(angle) * magnitude, jnp.cos(angle) * magnitude
    wide = x.astype(jnp.float32)
    if rotary.interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
    else:
        first, second = jnp.split(wide, 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    if rotary.interleaved:
        return jnp.stack(rotated, axis=-1).reshape(x.shape).astype(x.dtype)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def sinusoids(positions: Array, width: int) -> Array:
    """Returns ``(B, L, M)`` float32 for ``positions (B, L)``: all sines, then all cosines."""
    half = width // 2
    frequency = jnp.exp(jnp.arange(half) * -(math.log(10000.0) / (half - 1)))
    angle = positions[..., None] * frequency
    found = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    return jnp.pad(found, ((0, 0), (0, 0), (0, width % 2)))


class RelativeBias(nnx.Module):
    """T5's learned relative positions: one number per head and distance bucket (1910.10683)."""

    def __init__(
        self,
        num_heads: int,
        key: Array,
        *,
        buckets: int = 32,
        max_distance: int = 128,
        both_ways: bool = False,
    ):
        """Makes the table ``(buckets, H)``; half of it is for later tokens if ``both_ways``."""
        self.table = weight(key, (buckets, num_heads), (None, "heads"), fan_in=1, scale=1e-2)
        self.max_distance = max_distance
        self.both_ways = both_ways

    def __call__(self, queries: Array, keys: Array) -> Array:
        """Returns ``(1, H, L, T)`` float32 for the slots ``queries (L,)`` and ``keys (T,)``."""
        table = self.table[...]
        distance = queries[:, None] - keys[None, :]
        if self.both_ways:
            half = table.shape[0] // 2
            later = jnp.where(distance < 0, half, 0)
            bucket = later + _bucket(jnp.abs(distance), half, self.max_distance)
        else:
            bucket = _bucket(jnp.maximum(distance, 0), table.shape[0], self.max_distance)
        return jnp.moveaxis(table[bucket], -1, 0)[None]


def _bucket(distance: Array, buckets: int, max_distance: int) -> Array:
    """T5's buckets of non-negative distances: half exact, the rest spaced by logarithm."""
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1) / exact) / math.log(max_distance / exact)
    spaced = exact + (ratio * (buckets - exact)).astype(jnp.int32)
    return jnp.where(distance < exact, distance, jnp.minimum(spaced, buckets - 1))
