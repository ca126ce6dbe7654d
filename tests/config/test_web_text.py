"""Configs of large corpora, on small local copies with files and fields of the originals."""

import pytest

from moe_jax.config.loading import experiment_of
from moe_jax.config.unread import unread
from moe_jax.counting import count
from moe_jax.data import eval_batches, open_source, open_tokenizer, train_batches
from tests.data.corpora import write_rows

pytest.importorskip("datasets", reason="datasets is not installed")

SMALL = {
    "data.vocab_size": 300,
    "data.seq_length": 16,
    "data.batch_size": 8,
    "data.shuffle_window": 32,
    "data.eval_one_in": 20,
    "training.loss_chunk": 0,
}


def text(kind, number):
    return f"{kind} document {number}: the plant turns light into sugar, and then it grows. " * 3


def fineweb_edu(root):
    """Parquet files of subsets, named in the card; no split for validation."""
    (root).mkdir()
    configs = "\n".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {path}/*"
        for name, path in (("default", "data/*"), ("sample-10BT", "sample/10BT"))
    )
    (root / "README.md").write_text(f"---\nconfigs:\n{configs}\n---\n")
    for part in range(2):
        rows = [
            {
                "text": text("edu", 30 * part + i),
                "id": f"<urn:uuid:{i}>",
                "dump": "CC-MAIN-2024-10",
                "url": "https://example.org/",
                "file_path": "s3://commoncrawl/x.warc.gz",
                "language": "en",
                "language_score": 0.97,
                "token_count": 42,
                "score": 3.2,
                "int_score": 3,
            }
            for i in range(30)
        ]
        write_rows(root / f"sample/10BT/{part:03d}_00000.parquet", rows)
    write_rows(root / "data/CC-MAIN-2024-10/train-00000.parquet", [{"text": "another subset"}])


def dclm(root):
    """Compressed JSON lines in shards of shards, without a card and without splits."""
    for shard in range(2):
        rows = [
            {
                "bff_contained_ngram_count_before_dedupe": 2,
                "language_id_whole_page_fasttext": {"en": 0.93},
                "metadata": {"Content-Length": "61769", "WARC-Type": "response"},
                "previous_word_count": 120,
                "text": text("dclm", 30 * shard + i),
                "url": "https://example.org/",
                "warcinfo": "robots: classic",
                "fasttext_openhermes_reddit_eli5_vs_rw_v2_bigram_200k_train_prob": 0.08,
            }
            for i in range(30)
        ]
        folder = root / "global-shard_01_of_10/local-shard_0_of_10"
        write_rows(folder / f"shard_{shard:08d}_processed.jsonl.zst", rows)


def c4(root):
    """Compressed JSON lines in a folder per configuration, with two splits."""
    root.mkdir()
    (root / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n"
        "  - split: train\n    path: en/c4-train.*.json.gz\n"
        "  - split: validation\n    path: en/c4-validation.*.json.gz\n---\n"
    )

    def rows(kind, count):
        about = {"timestamp": "2019-04-25T12:57:54Z", "url": "https://example.org/"}
        return [{"text": text(kind, i), **about} for i in range(count)]

    write_rows(root / "en/c4-train.00000-of-01024.json.gz", rows("train", 60))
    write_rows(root / "en/c4-validation.00000-of-00008.json.gz", rows("validation", 3))


@pytest.mark.parametrize(
    ("write", "name", "training", "validation"),
    [
        # One in 20 of 60 documents is for validation, at equal distances: 10, 30 and 50.
        (fineweb_edu, "HuggingFaceFW/fineweb-edu", 57, text("edu", 10)),
        (dclm, "mlfoundations/dclm-baseline-1.0", 57, text("dclm", 10)),
        (c4, "allenai/c4", 60, text("validation", 0)),
    ],
)
def test_a_copy_in_the_format_of_the_original_feeds_a_run(
    tmp_path, write, name, training, validation
):
    write(tmp_path / "copy")
    source = experiment_of(write.__name__).data.source
    assert source.startswith(f"hf:{name}")
    changes = SMALL | {
        "data.source": source.replace(name, str(tmp_path / "copy")),
        "data.data_dir": str(tmp_path / "data"),
    }
    experiment = experiment_of(write.__name__, changes)
    experiment.check(1)
    config = experiment.data
    assert len(open_source(config, "train")) == training
    assert open_source(config, "eval")[0] == validation
    tokenizer = open_tokenizer(config)
    for batches in (train_batches(config, tokenizer), eval_batches(config, tokenizer)):
        batch = next(batches)
        batches.close()
        found = tokenizer.decode(batch["targets"][batch["segments"] > 0])
        assert batch["inputs"].shape == (8, 16) and "sugar, and then" in found


@pytest.mark.parametrize("name", ["fineweb_edu", "fineweb_edu:sample-100BT", "dclm", "c4:tfds"])
def test_the_settings_fit_and_all_have_an_effect(name):
    experiment = experiment_of(name)
    assert unread(experiment) == []
    for devices in (1, 8, 64):
        experiment.check_program(devices)


def test_the_model_has_the_size_in_its_description():
    cost = count(experiment_of("c4").model, 32_768, experiment_of("c4").sequence)
    assert (round(cost.total / 1e9, 2), round(cost.active / 1e9, 2)) == (0.51, 0.11)


def test_subsets_and_variants():
    subset = experiment_of("fineweb_edu:CC-MAIN-2024-10").data.source
    assert subset == "hf:HuggingFaceFW/fineweb-edu/CC-MAIN-2024-10"
    assert experiment_of("c4:tfds").data.source == "c4/en"
    with pytest.raises(ValueError, match="unknown variant 'de'"):
        experiment_of("c4:de")
