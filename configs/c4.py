"""C4, the colossal clean crawled corpus of T5 (Raffel et al. 2020, 1910.10683): ``--config=c4``.

``allenai/c4`` has files ``.json.gz`` with the field ``text``, and the splits ``train`` and
``validation``. Of the 365 million training documents of the configuration ``en``, the first 10
million are read; ``data.train_documents`` changes the number. Needs ``pip install ".[datasets]"``,
and a network at the first start. ``--config=c4:tfds`` reads the dataset ``c4/en`` of TFDS instead,
which must be prepared in ``data.data_dir``.
"""

from ml_collections import ConfigDict
from moe_jax.configs.families import web_text

SOURCES = {"hub": "hf:allenai/c4/en", "tfds": "c4/en"}


def get_config(variant: str = "hub") -> ConfigDict:
    if variant not in SOURCES:
        raise ValueError(f"unknown variant {variant!r}; known: {', '.join(SOURCES)}")
    config = web_text.web_text("c4", SOURCES[variant])
    config.data.train_documents = 10_000_000
    return config
