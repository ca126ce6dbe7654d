"""Trinity Large 400B-A13B (Arcee AI 2026, 2602.17004), see ``families/trinity.py``."""

from ml_collections import ConfigDict
from moe_jax.configs.families import trinity

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 400e9, 0.02, trinity.SOURCE),
    PublishedNumber("active.no_input_embedding", 13e9, 0.05, trinity.SOURCE),
)


def get_config() -> ConfigDict:
    return trinity.trinity(
        "trinity_large",
        layers=60,
        width=3072,
        heads=(48, 8, 128),
        dense=6,
        window=4096,
        experts=(256, 4),
        dims=(12288, 3072),
        scale=2.448,
    )
