"""The analysis of groups of files by command, and one-line errors."""

import json
import shutil
from html import unescape
from types import SimpleNamespace
from typing import cast

import jax
import numpy as np
import pytest
import tokenizers

from moe_jax import data, models
from moe_jax.analysis.atlas_page import write_atlas
from moe_jax.analysis.explained import write_explanation
from moe_jax.analysis.texts import Text
from moe_jax.cli import main
from moe_jax.errors import ConfigError
from moe_jax.interop import native
from moe_jax.interop.huggingface import FAMILIES, save
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.routing import preset
from moe_jax.run import analyzing, workdir
from moe_jax.run.analyzing import _energy, analyze, groups_of, require_analysable
from moe_jax.run.api import train
from moe_jax.run.corpus import read
from moe_jax.run.explaining import explain
from moe_jax.run.opened import FolderModel, open_folder
from tests import browser
from tests.data.test_hf_tokenizer import byte_level
from tests.parity import compare_models as compare
from tests.surgery.test_api import files_of
from tests.test_face import TINY_MIXTRAL

LEAKY = {"allow_future_leak": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Mixtral with a byte-level tokenizer, beside two groups of texts."""
    path = tmp_path_factory.mktemp("analysed")
    config = {**TINY_MIXTRAL, "vocab_size": 300}
    model = models.make(FAMILIES["mixtral"].read(config), 300, jax.random.key(0))
    save(model, path / "model", "mixtral", original=config)
    byte_level(path / "model")
    for name, text in (("code", "def f(x):\n"), ("prose", "<i>a sheep sees</i> ")):
        (path / name).mkdir()
        for number in (1, 2):
            (path / name / f"{number}.txt").write_text(text * number)
    return path


def test_the_command_compares_groups(folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "page.html"
    groups = [f"--corpus={name}=files:{folder}/{name}/*.txt" for name in ("code", "prose")]
    arguments = [str(folder / "model"), *groups, f"--output={output}"]
    monkeypatch.setattr("sys.argv", ["moe-jax", "analyze", *arguments])
    main.main()
    out, page = capsys.readouterr().out, output.read_text()
    found = json.loads(output.with_suffix(".json").read_text())
    assert [group["documents"] for group in found["groups"]] == [2, 2]
    assert found["gap"]["interval"] is None and "no interval: a group has 2 documents" in page
    (layer,) = found["layers"]
    assert set(layer["information"]) == {"token", "position", "label"}
    assert len(layer["similarity"]["outputs"]) == 4
    assert layer["hidden_predicts_next"] is None  # There is no next layer.
    assert found["gap"]["drops"]["dropped"] == 0
    # The two groups have few letters in common.
    (one,) = found["drift"]
    assert (one["group"], one["reference"]) == ("prose", "code") and "data" in one["drifted"]
    assert found["energy"]["kind"] == "estimate" and "estimate" in page
    assert "group code" in out and "gap " in out and "gap of drops " in out
    assert "group prose against code: drift: data" in out and one["words"] in unescape(page)
    assert page.count('class="expert"') == 4
    # Two sections with one layer each, in a well-formed page.
    assert browser.elements(output)["details"] == 2
    assert "<i>" not in page and "https:" not in page


def test_experts_that_choose_tokens_are_analysed_and_explained(folder, tmp_path):
    router = preset("expert_choice", eval_capacity_factor=0.5)
    moe = MoEConfig(every=1, num_experts=4, expert_dim=8, router=router, **LEAKY)
    config = models.DecoderConfig(num_layers=2, width=16, num_heads=2, mlp_dim=16, moe=moe)
    path = tmp_path / "chosen"
    model = models.make(config, 300, jax.random.key(0))
    native.save(native.Imported(model, config, 300, "", {}), path)
    byte_level(path / "released")
    corpus = [f"{name}=files:{folder}/{name}/*.txt" for name in ("code", "prose")]
    before = files_of(path)
    found = analyze(path, corpus)
    assert files_of(path) == before
    first, last = found["layers"]
    for layer in (first, last):
        # Every expert takes as many tokens as the others, and some tokens have no expert.
        assert (layer["entropy"], layer["dead"], layer["dropped"]) == (pytest.approx(1), [], 0)
        assert 0 < layer["unrouted"] < 1
    # Later tokens decide which tokens the experts take, so no token has a likelihood of its own.
    assert [group["loss"] for group in found["groups"]] == [None, None]
    assert 0 <= first["predicts_next"]["accuracy"] <= 1 and last["predicts_next"] is None
    assert first["hidden_predicts_next"]["chance"] < 1
    shares = [group["unrouted"] for group in found["groups"]]
    tokens = [group["tokens"] for group in found["groups"]]
    both = np.mean([first["unrouted"], last["unrouted"]])
    assert np.average(shares, weights=tokens) == pytest.approx(both)
    for layer in explain(path, "def f").layers:
        assert layer.error < 1e-5 and not layer.effects[layer.experts < 0].any()
        # 4 experts of factor 1 / 2 choose an eighth of the tokens each, and at least one.
        assert (layer.experts >= 0).sum(0).tolist() == [max(len(layer.experts) // 8, 1)] * 4


def test_energy_by_hand():
    # FLOPs per token of a layer of width 8: four attention matrices 2 * 4 * 8 * 8 = 512, scores and
    # sums of values 2 * 2 * 8 for half of 4 keys = 64, the router 2 * 8 * 4 = 64, two matrices of
    # one expert 2 * 2 * 8 * 16 = 512; and the head of 16 ids 2 * 8 * 16 = 256. All: 1408.
    moe = MoEConfig(every=1, num_experts=4, expert_dim=16, router=preset("switch"))
    config = models.DecoderConfig(num_layers=1, width=8, num_heads=2, head_dim=4, moe=moe)
    opened = cast(FolderModel, SimpleNamespace(model=SimpleNamespace(config=config), vocab_size=16))
    texts = [Text([1, 2, 3, 4]), Text([1, 2])]
    once, twice = _energy(opened, texts, 1e3), _energy(opened, texts, 2e3)
    assert once["flops"] == twice["flops"] == 6 * 1408
    assert (once["joules"], twice["joules"]) == pytest.approx((8.448, 4.224))
    assert once["joules_per_1000_tokens"] == pytest.approx(1408)
    assert twice["joules_per_1000_tokens"] == pytest.approx(704)
    assert "2000 FLOPs per joule" in twice["assumption"]


@pytest.mark.parametrize(
    ("corpus", "reason"),
    [
        (["files:a", "b=files:b"], "--corpus=files:a has no label"),
        (["a=files:a", "a=files:b"], "'a' twice"),
        (["a=mixture"], "is not NAME=files:GLOB"),
        ([], "--corpus is missing"),
    ],
)
def test_a_wrong_corpus_is_one_line(corpus, reason):
    with pytest.raises(ConfigError, match=reason) as error:
        groups_of(corpus)
    assert "\n" not in str(error.value)


def test_files_that_do_not_exist_are_named_before_the_model_is_read(folder, monkeypatch):
    monkeypatch.setattr(analyzing, "open_folder", None)  # A call would fail.
    with pytest.raises(ConfigError, match="nothing") as error:
        analyze(folder / "model", f"files:{folder}/nothing/*.txt")
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_analysed_is_named_before_a_corpus_is_prepared(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(analyzing, "_groups", None)  # A call would fail.
    with pytest.raises(ConfigError, match="holds no run, no converted model"):
        analyze(tmp_path, "python_library")
    bare = tmp_path / "bare"
    shutil.copytree(folder / "model", bare, ignore=lambda *_: {"tokenizer.json"})
    with pytest.raises(ConfigError, match="has no tokenizer"):
        analyze(bare, "python_library")


def test_a_group_may_be_one_short_text_with_any_name(tmp_path):
    (tmp_path / "a.txt").write_text("kurz")
    found = analyzing._groups(tmp_path, groups_of([f"日本 語=files:{tmp_path}/a.txt"]), 64)
    assert {name: [*source] for name, source in found.items()} == {"日本 語": ["kurz"]}


def test_a_streamed_corpus_is_read_no_further_than_its_documents(monkeypatch):
    seen = []
    monkeypatch.setattr(data, "check_source", seen.append)
    monkeypatch.setattr(data, "open_source", lambda config, split: [])
    analyzing._documents("", "hf:someone/text", 5)
    assert seen[0].eval_documents == 5


def test_bytes_of_a_text_are_those_of_its_tokens(folder):
    # The text is cut inside of a character of three bytes.
    opened = open_folder(folder / "model", None, require_analysable)
    _, _, sizes = read(opened, [["日本語"]], 1, 6)
    ids = opened.tokenizer.encode("日本語")[:5]
    assert sizes.tolist() == [int(opened.tokenizer.byte_lengths[ids].sum())]
    assert sizes[0] != len(opened.tokenizer.decode(ids).encode())


def test_what_only_a_run_has_is_refused_before_a_pass(folder, monkeypatch):
    monkeypatch.setattr(analyzing, "open_folder", None)  # A call would fail.
    path = folder / "model"
    with pytest.raises(ConfigError, match=f"--earlier=3 is a step of a run, and {path} is no run"):
        analyze(path, f"files:{folder}/code/*.txt", earlier=[3])
    with pytest.raises(ConfigError, match="--corpus=validation is the validation set of a run"):
        analyze(path, "validation")


def test_the_validation_set_of_a_run_has_its_parts_as_groups(tmp_path, monkeypatch):
    for name in ("a", "b"):
        for number in range(4):
            (tmp_path / f"{name}{number}.txt").write_text(f"{name}{number}")
    parts = [
        data.PartConfig(source=f"files:{tmp_path}/{name}*.txt", name=name, eval_one_in=2)
        for name in "ab"
    ]
    config = data.DataConfig(source="blend", blend=data.BlendConfig(tuple(parts)))
    monkeypatch.setattr(analyzing, "kind_of", lambda folder: "run")
    monkeypatch.setattr(workdir, "load", lambda folder: SimpleNamespace(data=config))
    found = analyzing._groups(tmp_path, groups_of(["validation"]), 64)
    held = {name: [source[i] for i in range(len(source))] for name, source in found.items()}
    assert sum(map(len, held.values())) == data.read_contents(config).validation < 8
    assert all(text.startswith(name) for name, texts in held.items() for text in texts)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (models.DecoderConfig(moe=MoEConfig(every=0)), "dense"),
        (models.DecoderConfig(moe=MoEConfig(router=preset("soft_moe"), **LEAKY)), "take mixtures"),
    ],
)
def test_a_model_whose_tokens_choose_no_experts_is_named(config, reason):
    with pytest.raises(ConfigError, match=reason) as error:
        require_analysable(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "config", [models.EncoderDecoderConfig(), models.DecoderConfig(causal=False)]
)
def test_encoders_are_analysable(config):
    require_analysable(config)


def test_a_run_is_compared_with_its_earlier_checkpoints_and_explained(tmp_path):
    workdir = tmp_path / "run"
    small = {
        "data.source": "mixture",
        "data.tokenizer": "bytes",
        "data.seq_length": 32,
        "data.batch_size": 8,
        "model.num_layers": 2,
        "model.width": 16,
        "model.num_heads": 2,
        "model.mlp_dim": 16,
        "model.moe.every": 1,
        "model.moe.expert_dim": 16,
        "data.eval_documents": 4,
        "optimizer.warmup_steps": 1,
        "training.steps": 4,
        "training.eval_every": 2,
        "training.checkpoint_every": 2,
        "training.keep_last": 3,
        "training.alarms": ({"type": "LowEntropy", "below": 1.0}, {"type": "Drift", "above": 1.0}),
    }
    train("quickstart", workdir, small)
    found = analyze(workdir, "mixture", earlier=(2, 4), documents=4, length=16)
    before, same = found["saturation"]
    assert before["step"] == 2 and all(0 <= share <= 1 for share in before["layers"])
    assert same["layers"] == [1, 1]  # Step 4 is the final checkpoint.
    # Checkpoints read the same documents.
    assert before["drift"]["tokens"] == 0 and same["drift"]["drifted"] == "none"
    # The load of a few tokens is never even, and no distance is above 1.
    assert list(found["groups"][0]["alarms"]) == ["LowEntropy"]
    with pytest.raises(ConfigError, match="--earlier=4 comes after the analysed step 2"):
        analyze(workdir, "mixture", step=2, earlier=(4,))
    with pytest.raises(ConfigError, match="--earlier=3 is no checkpoint of .*: choose of 2, 4"):
        analyze(workdir, "mixture", earlier=(2, 3))
    first, last = (layer["hidden_predicts_next"] for layer in found["layers"])
    assert 0 <= first["accuracy"] <= 1 and last is None
    assert found["gap"] is None and [group["name"] for group in found["groups"]] == ["all"]
    explained = explain(workdir, "abc")
    assert explained.pieces[1:] == ("a", "b", "c") and len(explained.layers) == 2
    assert max(layer.error for layer in explained.layers) < 1e-5
    page, _ = write_atlas(found, tmp_path / "analyze.html", "analysis")
    assert "Alarm, group all: LowEntropy in layer 0" in page.read_text()
    # A well-formed page: every element closes the last one that is open.
    assert browser.elements(page)["tr"] == 1 + 2 + 1 + 1 + 1 + 2 + 2 * 8


def test_the_atlas_is_read_in_a_browser(folder, tmp_path):
    groups = [f"{name}=files:{folder}/{name}/*.txt" for name in ("code", "prose")]
    found = analyze(folder / "model", groups)
    page, _ = write_atlas(found, tmp_path / "analyze.html", "analysis")
    load = found["layers"][0]["load"]
    having = [one["expert"] for one in found["atlas"][0] if "f" in pieces_of(one)]
    with browser.started() as chromium:
        browser.check(chromium, page)
        with browser.opened(chromium, page.as_uri()) as one:
            rows = one.locator("#atlas tr.expert")
            assert rows.count() == 4
            one.select_option("#order", "load")
            order = [int(row.get_attribute("data-expert")) for row in rows.all()]
            assert order == sorted(range(4), key=lambda expert: -load[expert])
            one.fill("#token", "f")
            shown = [
                int(row.get_attribute("data-expert")) for row in rows.all() if row.is_visible()
            ]
            assert sorted(shown) == having and len(having) < 4
            # Three maps of the pairs of experts.
            assert one.locator("#maps svg").count() == 3


def pieces_of(one):
    return "".join(token["piece"] for token in one["tokens"])


LETTERS = "abcdefghijklmnopqrstuvwxyz"
FAMILY_CASES = sorted({compare.family_of(case): case for case in compare.MIXTURES}.values())


def letters(folder):
    """A tokenizer of single letters, for the vocabularies of recorded models."""
    known = {name: i for i, name in enumerate(["<pad>", "<s>", "</s>", "<unk>", *LETTERS])}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(known, [], unk_token="<unk>"))
    inner.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_every_family_is_analysed_and_explained(case, tmp_path):
    compare.recorded(case, tmp_path)
    letters(tmp_path)
    for name, text in (("a", "abcdefgh"), ("b", "zyxzyx")):
        for number in (1, 2):
            (tmp_path / f"{name}{number}.txt").write_text(text * number)
    groups = [f"{name}=files:{tmp_path}/{name}*.txt" for name in ("a", "b")]
    found = analyze(tmp_path, groups, length=12, batch_size=4)
    page, _ = write_atlas(found, tmp_path / "analyze.html", case)
    assert browser.elements(page)["details"] == 2 * len(found["layers"])
    for layer in found["layers"]:
        assert sum(layer["load"]) == pytest.approx(1)
        assert set(layer["information"]) == {"token", "position", "label"}
    assert all(group["bits_per_byte"] > 0 for group in found["groups"])
    explained = explain(tmp_path, "abc")
    assert len(explained.layers) == len(found["layers"])
    page, _ = write_explanation(explained, tmp_path / "explain.html", case)
    assert browser.elements(page)["svg"] == 1


def test_a_run_that_fills_blanks_is_analysed(tmp_path):
    small = {
        "data.source": "mixture",
        "data.eval_documents": 4,
        "training.steps": 4,
        "training.eval_every": 0,
        "training.checkpoint_every": 2,
        "training.keep_last": 3,
    }
    train("tests/system/tiny_spans.py:switch", tmp_path / "run", small)
    found = analyze(tmp_path / "run", "mixture", earlier=(2,), documents=4, length=24)
    assert [layer["layer"] for layer in found["layers"]] == ["layer encoder 1", "layer decoder 1"]
    (group,) = found["groups"]
    assert group["documents"] == 4 and 0 < group["bits_per_byte"] < 20
    assert len(found["saturation"][0]["layers"]) == 2
    # Both stacks read sentinels.
    for experts in found["atlas"]:
        pieces = {token["piece"] for one in experts for token in one["tokens"]}
        assert "<extra_id_0>" in pieces
    page, _ = write_atlas(found, tmp_path / "analyze.html", "blanks")
    with browser.started() as chromium:
        browser.check(chromium, page)
