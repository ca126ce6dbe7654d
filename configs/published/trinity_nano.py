"""Trinity Nano 6B-A1B (Arcee AI 2025, 2602.17004), see ``families/trinity.py``.

The number of active parameters is printed in whole billions: 0.82 G without the embedding.
"""

from ml_collections import ConfigDict
from moe_jax.configs.families import trinity

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 6e9, 0.03, trinity.SOURCE),
    PublishedNumber("active.no_input_embedding", 1e9, 0.19, trinity.SOURCE),
)


def get_config() -> ConfigDict:
    return trinity.trinity(
        "trinity_nano",
        layers=56,
        width=1024,
        heads=(8, 2, 128),
        dense=2,
        window=2048,
        experts=(128, 8),
        dims=(3072, 256),
        scale=2.826,
    )
