"""DCLM-Baseline (Li et al. 2024, 2406.11794): ``--config=dclm``.

``mlfoundations/dclm-baseline-1.0`` has files ``.jsonl.zst`` with the field ``text`` and the split
``train`` alone. Of its 3 billion documents, the first 10 million are read, and one in 1,000 of
these is for validation; ``data.train_documents`` changes the number. Needs
``pip install ".[datasets]"``, and a network at the first start.
"""

from ml_collections import ConfigDict
from moe_jax.configs.families import web_text


def get_config() -> ConfigDict:
    config = web_text.web_text("dclm", "hf:mlfoundations/dclm-baseline-1.0")
    web_text.without_validation(config, one_in=1000)
    config.data.train_documents = 10_000_000
    return config
