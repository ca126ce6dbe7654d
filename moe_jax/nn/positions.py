"""Positions of tokens: rotations of queries and keys, a learned bias, or added vectors."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from moe_jax.errors import ConfigError
from moe_jax.nn.init import weight
from moe_jax.ranges import (
    Factor,
    Growth,
    Natural,
    NonNegative,
    Positive,
    PositiveShare,
    Range,
    Ranged,
)

RotaryBase = Annotated[float, Range(1, 1e12, above=True)]
# An encoder splits the table between the two directions; half of the buckets of a direction hold
# one distance each.
Buckets = Annotated[int, Range(4, 2**20)]


@dataclasses.dataclass(frozen=True)
class LinearScaling(Ranged):
    """Linear scaling: positions are divided by ``factor`` (Chen et al. 2023, 2306.15595).

    Attributes:
        factor: Factor by which all wavelengths grow.
    """

    factor: Growth = 1.0

    def frequencies(self, plain: Float[Array, " D2"], base: float) -> Float[Array, " D2"]:
        """Returns the scaled frequencies ``(D / 2,)``."""
        del base
        return plain / self.factor

    @property
    def magnitude(self) -> float:
        """The factor of sine and cosine."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class Llama3Scaling(Ranged):
    """Llama 3's scaling: ``factor`` stretches long wavelengths and not short ones (2407.21783).

    Attributes:
        factor: Factor by which the longest wavelengths grow.
        low: Wavelengths above ``original_length / low`` grow by the whole factor.
        high: Wavelengths below ``original_length / high`` do not grow. Between the two bounds the
            growth is a ramp, or a step if the bounds are equal (Llama 4 Scout).
        original_length: Number of tokens in the texts that the model was first trained on.
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

    def frequencies(self, plain: Float[Array, " D2"], base: float) -> Float[Array, " D2"]:
        """Returns the scaled frequencies ``(D / 2,)``."""
        del base
        turns = self.original_length * plain / (2 * math.pi)
        if self.high == self.low:
            return jnp.where(turns < self.low, plain / self.factor, plain)
        unscaled = jnp.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0)
        return plain * (unscaled + (1 - unscaled) / self.factor)

    @property
    def magnitude(self) -> float:
        """The factor of sine and cosine."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class YarnScaling(Ranged):
    """YaRN (Peng et al. 2023, 2309.00071, section 3): long wavelengths grow more than short ones.

    Attributes:
        factor: Factor by which the longest wavelengths grow.
        original_length: Number of tokens in the texts that the model was first trained on.
        beta_fast: Features that turn more often than this over the original length keep their
            wavelength.
        beta_slow: Features that turn less often than this over the original length grow their
            wavelength by the whole factor. With equal bounds (Kimi K2: 1 and 1) features between
            them grow by a step.
        truncate: True rounds the bounds of these two groups to whole features.
        attention_factor: Factor of sine and cosine; 0 selects ``0.1 log(factor) + 1``.
    """

    factor: Growth = 1.0
    original_length: Positive = 4096
    beta_fast: Factor = 32.0
    beta_slow: Factor = 1.0
    truncate: bool = True
    attention_factor: NonNegative = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.beta_fast < self.beta_slow:
            raise ConfigError(
                f"YarnScaling.beta_fast={self.beta_fast} must be at least "
                f"YarnScaling.beta_slow={self.beta_slow}"
            )

    def frequencies(self, plain: Float[Array, " D2"], base: float) -> Float[Array, " D2"]:
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
        """The factor of sine and cosine."""
        return self.attention_factor or 0.1 * math.log(max(self.factor, 1.0)) + 1.0


@dataclasses.dataclass(frozen=True)
class Rotary(Ranged):
    """Rotary positions: queries and keys are rotated by position (Su et al. 2021, 2104.09864).

    Attributes:
        base: Base of the frequencies; the longest wavelength is about ``2 * pi * base``.
        interleaved: True rotates the features ``2i`` and ``2i+1`` as a pair, False the features
            ``i`` and ``i + D/2``.
        scaling: Scaling of the frequencies for texts longer than the texts of pre-training;
            ``None`` means no scaling.
        share: Share of the features that are rotated, the first ones; the others keep their values
            (``partial_rotary_factor``, GLM-4.5: 0.5). Their number is rounded down to pairs, and is
            at least one pair.
        proportional: True gives the rotated features the pairs and the frequencies that they have
            in a head which is rotated as a whole (proportional RoPE, Gemma 4): with halves, the
            features ``i`` and ``i + D/2`` form a pair, and the first ``share`` of the pairs turns.
    """

    base: RotaryBase = 10000.0
    interleaved: bool = False
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None
    share: PositiveShare = 1.0
    proportional: bool = False

    def rotated(self, dim: int) -> int:
        """Returns the number of rotated features among ``dim``, an even number."""
        return 2 * max(1, int(dim * self.share) // 2)


@dataclasses.dataclass(frozen=True)
class T5Relative(Ranged):
    """T5's relative positions: a learned bias by distance, shared by all layers of a stack.

    Source: Raffel et al. 2019, 1910.10683.

    Attributes:
        buckets: Number of buckets of distances; a bucket has one bias per head.
        max_distance: Distance beyond which all distances share the last bucket.
    """

    buckets: Buckets = 32
    max_distance: Positive = 128


@dataclasses.dataclass(frozen=True)
class Learned(Ranged):
    """Learned positions: a learned vector per position is added to the embedding.

    Attributes:
        length: Number of positions, the longest text that the model can read.
        offset: Row of position 0 in the table.
    """

    length: Positive = 1024
    offset: Natural = 0


@dataclasses.dataclass(frozen=True)
class Sinusoidal(Ranged):
    """Sinusoidal positions: fixed sines, then cosines, are added to the embedding (1706.03762).

    The layout of the features is fairseq's.

    Attributes:
        offset: Number added to every position; 2 in fairseq, which counts from its padding index.
    """

    offset: Natural = 2


@dataclasses.dataclass(frozen=True)
class NoPositions(Ranged):
    """No positions: a causal model knows the order of tokens by its mask alone."""


Positions = Rotary | T5Relative | Learned | Sinusoidal | NoPositions


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rotate(
    x: Float[Array, "B H L D"], positions: Int[Array, "#B L"], rotary: Rotary
) -> Float[Array, "B H L D"]:
    """Returns ``x (B, H, L, D)``, each vector rotated by its position in ``positions (B, L)``."""
    return _rotated(x, *_turns(positions, rotary, x.shape[-1]), rotary)


def _rotate_forward(x: Array, positions: Array, rotary: Rotary) -> tuple[Array, Array]:
    return rotate(x, positions, rotary), positions


def _rotate_backward(rotary: Rotary, positions: Array, gradient: Array) -> tuple[Array, None]:
    """The transpose of a rotation is the rotation by the negative angle."""
    cos, sin = _turns(positions, rotary, gradient.shape[-1])
    return _rotated(gradient, cos, -sin, rotary), None


rotate.defvjp(_rotate_forward, _rotate_backward)


def _turns(
    positions: Int[Array, "#B L"], rotary: Rotary, dim: int
) -> tuple[Float[Array, "#B 1 L D2"], Float[Array, "#B 1 L D2"]]:
    """Returns cosine and sine of all pairs' angles, times their magnitude."""
    turned = rotary.rotated(dim)
    dim = dim if rotary.proportional else turned
    frequency = rotary.base ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    magnitude = 1.0
    if rotary.scaling is not None:
        frequency = rotary.scaling.frequencies(frequency, rotary.base)
        magnitude = rotary.scaling.magnitude
    if rotary.proportional:  # Pairs of frequency 0 keep their values.
        frequency = jnp.where(jnp.arange(dim // 2) < turned // 2, frequency, 0.0)
    angle = positions[:, None, :, None] * frequency
    # Without the barrier, XLA computes sine and cosine again for every head and half.
    return jax.lax.optimization_barrier((jnp.cos(angle) * magnitude, jnp.sin(angle) * magnitude))


def _rotated(x: Array, cos: Array, sin: Array, rotary: Rotary) -> Array:
    """Returns ``x (B, H, L, D)`` whose first ``2 N`` features are turned by ``N`` angles."""
    turned, kept = jnp.split(x, [2 * cos.shape[-1]], axis=-1)
    wide = turned.astype(jnp.float32)
    if rotary.interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
    else:
        first, second = jnp.split(wide, 2, axis=-1)
    pairs = (first * cos - second * sin, second * cos + first * sin)
    if rotary.interleaved:
        rotated = jnp.stack(pairs, axis=-1).reshape(turned.shape)
    else:
        rotated = jnp.concatenate(pairs, axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), kept], axis=-1)


def sinusoids(positions: Int[Array, "B L"], width: int) -> Float[Array, "B L M"]:
    """Returns the vectors ``(B, L, M)`` of ``positions (B, L)``: all sines, then all cosines."""
    half = width // 2
    frequency = jnp.exp(jnp.arange(half) * -(math.log(10000.0) / (half - 1)))
    angle = positions[..., None] * frequency
    vectors = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    return jnp.pad(vectors, ((0, 0), (0, 0), (0, width % 2)))


class RelativeBias(nnx.Module):
    """T5's relative positions: a learned number per head and bucket of distances (1910.10683)."""

    def __init__(
        self,
        num_heads: int,
        key: PRNGKeyArray,
        *,
        buckets: int = 32,
        max_distance: int = 128,
        both_ways: bool = False,
    ):
        """Initialises the table ``(buckets, H)``; half of it is for later keys if ``both_ways``."""
        self.table = weight(key, (buckets, num_heads), (None, "heads"), fan_in=1, scale=1e-2)
        self.max_distance = max_distance
        self.both_ways = both_ways

    @property
    def by_distance(self) -> BiasByDistance:
        """The bias as a function of the table's present values."""
        return BiasByDistance(self.table[...], self.max_distance, self.both_ways)

    def __call__(
        self, queries: Int[Array, "*B L"], keys: Int[Array, " T"]
    ) -> Float[Array, "#B H L T"]:
        """Returns the bias ``(B or 1, H, L, T)`` of scores; see ``BiasByDistance``."""
        return self.by_distance(queries, keys)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BiasByDistance:
    """A bias of scores by the distance of query and key.

    Attributes:
        table: Biases ``(buckets, H)``.
        max_distance: Distance beyond which all distances share the last bucket.
        both_ways: True if half of the table is for later keys.
    """

    table: Float[Array, "N H"]
    max_distance: int = dataclasses.field(metadata={"static": True})
    both_ways: bool = dataclasses.field(metadata={"static": True})

    def __call__(
        self, queries: Int[Array, "*B L"], keys: Int[Array, " T"]
    ) -> Float[Array, "#B H L T"]:
        """Returns the bias ``(B or 1, H, L, T)`` of scores.

        Args:
            queries: Positions ``(L,)`` of the queries of all rows, or ``(B, L)``.
            keys: Positions ``(T,)`` of the keys.
        """
        table = self.table
        distance = jnp.atleast_2d(queries)[:, :, None] - keys
        if self.both_ways:
            half = table.shape[0] // 2
            later = jnp.where(distance < 0, half, 0)
            bucket = later + _bucket(jnp.abs(distance), half, self.max_distance)
        else:
            bucket = _bucket(jnp.maximum(distance, 0), table.shape[0], self.max_distance)
        return jnp.moveaxis(table[bucket], -1, 1)


def _bucket(distance: Array, buckets: int, max_distance: int) -> Array:
    """Returns T5's buckets: half hold one distance each, the others grow with the logarithm."""
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1) / exact) / math.log(max_distance / exact)
    spaced = exact + (ratio * (buckets - exact)).astype(jnp.int32)
    return jnp.where(distance < exact, distance, jnp.minimum(spaced, buckets - 1))
