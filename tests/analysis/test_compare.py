"""A page that shows runs beside each other, from files written by hand."""

import dataclasses
import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from moe_jax.analysis.compare import compare, differences, opened
from moe_jax.config.loading import experiment_of
from moe_jax.config.schema import describe
from moe_jax.errors import ConfigError
from moe_jax.training.metrics import MetricsWriter
from tests import browser

# 8 rows of 256 tokens.
QUICKSTART = experiment_of("quickstart")
TOKENS = 2048


def write(folder, result=None, rates=(1.0, 1024.0, 2048.0), **training):
    changed = dataclasses.replace(QUICKSTART.training, **training)
    config = describe(dataclasses.replace(QUICKSTART, training=changed))
    with MetricsWriter(folder) as writer:
        for step, rate in zip((2, 4, 6), rates, strict=True):
            line = {"loss": 3.0 / step, "tokens_per_second": rate, "layers": []}
            flops = {"model_flops_per_second": 100.0 * rate}
            writer.write({"kind": "train", "step": step, **line, **flops})
        writer.write({"kind": "eval", "step": 6, "loss": 1.25, "layers": []})
    (folder / "config.json").write_text(json.dumps({"config": config}))
    if result:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.fixture
def pair(tmp_path):
    result = {"loss": 1.25, "bits_per_byte": 2.0, "accuracy": 0.5, "steps": 6}
    return [
        write(tmp_path / "a", result),
        write(tmp_path / "b", {**result, "loss": 1.5}, seed=7, log_every=3),
    ]


def test_places_of_the_training_lines(pair):
    run = opened(pair[0])
    np.testing.assert_array_equal(run.places("steps"), [2, 4, 6])
    np.testing.assert_array_equal(run.places("tokens"), [2 * TOKENS, 4 * TOKENS, 6 * TOKENS])
    np.testing.assert_allclose(run.places("flops"), 100.0 * run.places("tokens"))
    # 4096 tokens at 1024 (the median; the first rate includes compilation), 1024 and 2048 a second.
    np.testing.assert_allclose(run.places("seconds"), [4, 8, 10])


def test_a_validation_stands_at_its_step(pair):
    curve = opened(pair[0]).curve("tokens")
    np.testing.assert_array_equal(curve.eval_x, [6 * TOKENS])
    np.testing.assert_array_equal(curve.eval_loss, [1.25])
    np.testing.assert_allclose(curve.loss, [1.5, 0.75, 0.5])


def test_the_page_has_results_differences_and_four_charts(pair, tmp_path):
    page = compare(pair, tmp_path / "page.html").read_text()
    assert page.count("<svg") == 4
    for label in ("step", "training tokens", "training FLOPs", "seconds of training"):
        assert f">{label}</text>" in page
    # The lower loss is the best; equal numbers have no best one.
    assert re.findall(r"<b>(.*?)</b>", page) == ["1.2500"]
    table = page[page.index("Settings that differ") : page.index('id="curves"')]
    # The seed differs; how often lines are logged changes no number of a run.
    assert re.findall(r"<code>(.*?)</code>", table) == ["training.seed"]
    assert "<td>0</td><td>7</td>" in table
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//|url\(\s*["']?http""", page)
    for text in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ElementTree.fromstring(text)


def test_a_setting_that_a_run_lacks_is_a_dash():
    assert differences({"a": {"x": 1, "y": 2}, "b": {"x": 1}}) == {"y": ["2", "–"]}


def test_an_unfinished_run_is_shown_without_results(tmp_path):
    page = compare([write(tmp_path / "a"), write(tmp_path / "b")], tmp_path / "c.html").read_text()
    assert "All settings that change numbers are equal." in page
    assert "<b>" not in page and "–</td>" in page


def test_runs_of_one_name_are_named_by_their_paths(tmp_path):
    runs = [write(tmp_path / name / "run") for name in "xy"]
    page = compare(runs, tmp_path / "c.html").read_text()
    assert "x/run</td>" in page and "y/run</td>" in page


def test_names_are_escaped(tmp_path):
    runs = [write(tmp_path / "<i>a"), write(tmp_path / "b")]
    assert "<i>" not in compare(runs, tmp_path / "c.html").read_text()


def test_what_is_no_run_is_named(pair, tmp_path):
    with pytest.raises(ConfigError, match=r"nothing holds no run: train one there first"):
        compare([pair[0], tmp_path / "nothing"], tmp_path / "c.html")
    (tmp_path / "released").mkdir()
    (tmp_path / "released" / "config.json").write_text('{"model_type": "mixtral"}')
    with pytest.raises(ConfigError, match=r"released holds no run"):
        compare([pair[0], tmp_path / "released"], tmp_path / "c.html")
    with pytest.raises(ConfigError, match="two runs or more"):
        compare(pair[:1], tmp_path / "c.html")
    with pytest.raises(ConfigError, match="--output=.* is a folder"):
        compare(pair, tmp_path)
    (pair[1] / "result.json").write_text("{")
    with pytest.raises(ValueError, match=r"result.json is damaged"):
        compare(pair, tmp_path / "c.html")
    assert not (tmp_path / "c.html").exists()


def test_the_page_is_read_in_a_browser(pair, tmp_path):
    with browser.started() as chromium:
        browser.check(chromium, compare(pair, tmp_path / "compare.html"))
