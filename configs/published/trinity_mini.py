"""Trinity Mini 26B-A3B (Arcee AI 2025, 2602.17004), see ``families/trinity.py``."""

from ml_collections import ConfigDict
from moe_jax.configs.families import trinity

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 26e9, 0.02, trinity.SOURCE),
    PublishedNumber("active.no_input_embedding", 3e9, 0.05, trinity.SOURCE),
)


def get_config() -> ConfigDict:
    return trinity.trinity(
        "trinity_mini",
        layers=32,
        width=2048,
        heads=(32, 4, 128),
        dense=2,
        window=2048,
        experts=(128, 8),
        dims=(6144, 1024),
        scale=2.826,
    )
