"""Datasets of Hugging Face, from local folders in the layout of the Hub and from a cache."""

import dataclasses
import shutil

import pytest

from moe_jax.data import DataConfig, check_source, open_source, read_contents
from moe_jax.errors import ConfigError

from .corpora import write_rows

datasets = pytest.importorskip("datasets", reason="datasets is not installed")
huggingface_hub = pytest.importorskip("huggingface_hub")

CARD = """---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/train.*.json.gz
  - split: validation
    path: en/validation.*.json.gz
---
"""


@pytest.fixture
def folder(tmp_path):
    """A dataset with one configuration, two splits and compressed JSON lines."""
    root = tmp_path / "owner" / "set"
    write_rows(root / "en/train.0.json.gz", [{"body": f"t{i}", "url": "u"} for i in range(40)])
    write_rows(root / "en/validation.0.json.gz", [{"body": f"v{i}"} for i in range(3)])
    (root / "README.md").write_text(CARD)
    return root


def config_of(tmp_path, source, **more):
    data_dir = str(tmp_path / "data")
    return DataConfig(source=source, data_dir=data_dir, text_feature="body", **more)


def texts(config, split):
    source = open_source(config, split)
    return [source[i] for i in range(len(source))]


def test_splits_of_a_local_folder(tmp_path, folder):
    config = config_of(tmp_path, f"hf:{folder}/en")
    check_source(config)
    assert not (tmp_path / "data").exists()
    assert texts(config, "train") == [f"t{i}" for i in range(40)]
    assert texts(config, "eval") == ["v0", "v1", "v2"]
    check_source(config)
    # A single configuration needs no name.
    assert texts(dataclasses.replace(config, source=f"hf:{folder}"), "eval") == ["v0", "v1", "v2"]


def test_limits_stop_the_reading(tmp_path, folder):
    write_rows(folder / "en/train.1.json.gz", [{"body": None}])
    config = config_of(tmp_path, f"hf:{folder}/en", train_documents=5, eval_documents=2)
    assert texts(config, "train") == [f"t{i}" for i in range(5)]
    assert texts(config, "eval") == ["v0", "v1"]
    whole = dataclasses.replace(config, train_documents=None)
    with pytest.raises(ConfigError, match="row 41 of split .train.: .* holds NoneType"):
        texts(whole, "train")


def test_validation_can_come_from_the_training_split(tmp_path, folder):
    config = config_of(tmp_path, f"hf:{folder}/en", eval_split="", train_documents=20)
    assert texts(config, "eval") == ["t10"]
    assert texts(config, "train") == [f"t{i}" for i in range(20) if i != 10]


def test_with_a_source_for_validation_all_documents_are_for_training(tmp_path, folder):
    held = folder.parent / "held"
    shutil.copytree(folder / "en", held)
    (held / "train.0.json.gz").unlink()  # The other dataset has no training split.
    (folder / "en/validation.0.json.gz").unlink()
    (folder / "README.md").write_text("")
    config = config_of(tmp_path, f"hf:{folder}", eval_source=f"hf:{held}", eval_documents=2)
    check_source(config)
    assert len(texts(config, "train")) == 40 and texts(config, "eval") == ["v0", "v1"]
    config = dataclasses.replace(config, eval_source="mixture", eval_split="", train_documents=20)
    assert len(texts(config, "train")) == 20 and len(texts(config, "eval")) == 2


@pytest.mark.parametrize("both", [True, False])
def test_a_saved_dataset(tmp_path, both):
    saved = datasets.Dataset.from_list([{"body": f"t{i}"} for i in range(4)])
    if both:
        saved = datasets.DatasetDict({"train": saved, "validation": saved.select([0])})
    saved.save_to_disk(str(tmp_path / "saved"))
    config = config_of(tmp_path, f"hf:{tmp_path}/saved", eval_split="validation" if both else "")
    contents = read_contents(config)
    assert (contents.training, contents.validation) == ((4, 1) if both else (3, 1))
    with pytest.raises(ConfigError, match="split 'test': there .* only the split"):
        check_source(dataclasses.replace(config, train_split="test"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"source": "{}/fr"}, "'fr' not found"),
        ({"eval_split": "test"}, "Bad split: test"),
        ({"text_feature": "text"}, "has no field 'text'; it has body, url (set data.text_feature)"),
    ],
)
def test_errors_say_what_to_change(tmp_path, folder, fields, said):
    config = config_of(tmp_path, f"hf:{folder}/en")
    changes = {name: value.format(f"hf:{folder}") for name, value in fields.items()}
    with pytest.raises(ConfigError) as error:
        check_source(dataclasses.replace(config, **changes))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_cached_dataset_is_read_without_a_network(tmp_path, folder, monkeypatch):
    cache = tmp_path / "cache"
    datasets.load_dataset(str(folder), "en", cache_dir=str(cache))
    # Datasets of the Hub are cached under owner___name, local folders under the folder's name.
    made = next(path for path in cache.iterdir() if path.is_dir())
    shutil.move(made, cache / "owner___set")
    # HF_HUB_OFFLINE=1 and HF_HOME set these at import.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    config = config_of(tmp_path, "hf:owner/set/en")
    check_source(config)
    assert len(texts(config, "train")) == 40 and texts(config, "eval") == ["v0", "v1", "v2"]
    # The documents are kept now, so that neither network nor cache is needed.
    shutil.rmtree(cache)
    check_source(config)
    assert len(texts(config, "train")) == 40
    with pytest.raises(ConfigError, match="read it once where there is a network") as error:
        check_source(config_of(tmp_path, "hf:owner/other"))
    assert "\n" not in str(error.value)
