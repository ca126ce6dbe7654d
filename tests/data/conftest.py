import pytest

from moe_jax.data import DataConfig, open_source

from .corpora import write_corpus


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A TFDS directory with the real `python_library` prepared by the real builder."""
    directory = str(tmp_path_factory.mktemp("tfds"))
    open_source(DataConfig(data_dir=directory), "eval")
    return directory


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
