"""FineWeb-Edu (Penedo et al. 2024, 2406.17557): ``--config=fineweb_edu:SUBSET``.

The subset is a configuration of ``HuggingFaceFW/fineweb-edu``: ``sample-10BT`` (default),
``sample-100BT``, ``sample-350BT``, ``default`` or a crawl such as ``CC-MAIN-2024-10``. The dataset
has Parquet files with the field ``text`` and the split ``train`` alone; one document in 1,000 is
for validation. Needs ``pip install ".[datasets]"``, and a network at the first start.
"""

from ml_collections import ConfigDict
from moe_jax.configs.families import web_text


def get_config(subset: str = "") -> ConfigDict:
    subset = subset or "sample-10BT"
    config = web_text.web_text("fineweb_edu", f"hf:HuggingFaceFW/fineweb-edu/{subset}")
    web_text.without_validation(config, one_in=1000)
    return config
