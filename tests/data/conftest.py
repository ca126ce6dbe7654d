import fcntl
import os

import pytest

from moe_jax.data import DataConfig, open_source, open_tokenizer

from .corpora import write_corpus


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A TFDS directory with the real `python_library` prepared by the real builder.

    The first worker prepares it and trains its tokenizer, and the other one waits.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    config = DataConfig(data_dir=str(shared / "tfds"))
    with (shared / "tfds.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        open_source(config, "eval")
        open_tokenizer(config)
    return config.data_dir


@pytest.fixture(scope="session")
def library(data_dir):
    return DataConfig(data_dir=data_dir)


@pytest.fixture
def corpus(tmp_path):
    """40 short training documents and 3 validation documents, as a config for bytes."""
    train = [f"{i:02d}" + "xyz"[i % 3] * (i * 7 % 23) for i in range(40)]
    source = write_corpus(tmp_path, train, ["ab", "cdefg", "h"])
    return DataConfig(
        source=source,
        data_dir=str(tmp_path / "data"),
        tokenizer="bytes",
        seq_length=8,
        batch_size=4,
        shuffle_window=1,
    )
