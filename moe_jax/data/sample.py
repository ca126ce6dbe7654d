"""An even sample of a corpus, on which tokenizers are trained."""

from __future__ import annotations

from collections.abc import Iterator

from moe_jax.data.source import Source

SAMPLED_BYTES = 16_000_000


def even_sample(source: Source) -> Iterator[str]:
    """Yields documents at equal distances, about ``SAMPLED_BYTES`` in all, or all documents."""
    # A few documents estimate the size of the corpus well enough to choose the stride.
    probe = range(0, len(source), max(1, len(source) // 64))
    mean_bytes = sum(len(source[i].encode("utf-8")) for i in probe) / len(probe)
    wanted = max(1, round(SAMPLED_BYTES / max(1.0, mean_bytes)))
    for index in range(0, len(source), max(1, len(source) // wanted)):
        yield source[index]
