import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from moe_jax.analysis.report import summary, visible, write_report
from moe_jax.training.metrics import MetricsWriter, load_statistics
from tests import browser

_RESULT = {
    "loss": 1.25,
    "bits_per_byte": 1.5,
    "accuracy": 0.625,
    "dropped_fraction": 0.0,
    "layers": [],
    "baselines": {"uniform": 8.0, "order2": 2.25, "zlib": 2.75},
    "total_parameters": 123456,
    "active_parameters": 65432,
    "flops_per_token": 98765,
    "steps": 3,
    "tokens": 768,
    "skipped_updates": 0,
    "seconds": 12.0,
    "device": "1 x imaginary",
    "mesh": {"data": 1, "expert": 1, "model": 1},
}


def _layer(layer, load):
    losses = {"balance": 1.0 + layer / 100}
    fractions = {"dropped_fraction": 0.1, "unrouted_fraction": 0.0}
    return {"layer": layer, "losses": losses, "load": load, **fractions, **load_statistics(load)}


def _train(step, layers):
    return {
        "kind": "train",
        "step": step,
        "loss": 3.0 / step,
        "objective": 3.1 / step,
        "grad_norm": 0.5,
        "skipped_updates": 0,
        "dropped_fraction": 0.1,
        "learning_rate": 1e-3,
        "tokens_per_second": 1000.0,
        "layers": layers,
    }


def _write(folder, layers=(), tokens=(), name="a run", result=_RESULT):
    with MetricsWriter(folder) as writer:
        for step in (1, 2, 3):
            writer.write(_train(step, list(layers)))
        writer.write({"kind": "eval", "step": 3, "loss": 1.25, "layers": []})
    (folder / "config.json").write_text(json.dumps({"config": {"name": name}, "versions": {}}))
    (folder / "expert_tokens.json").write_text(json.dumps({"layers": list(tokens)}))
    if result:
        (folder / "result.json").write_text(json.dumps(result))
    return write_report(folder).read_text()


def _piece(text):
    return {"piece": text, "count": 17, "share": 0.5}


@pytest.fixture
def moe(tmp_path):
    layers = [_layer(1, [0.5, 0.5]), _layer(3, [0.75, 0.25])]
    tokens = [{"layer": 3, "experts": [[_piece("<script>alert(1)</script>")], [_piece(" \n")]]}]
    return _write(tmp_path, layers, tokens, name="<b>bold</b>")


def test_shows_curves_loads_and_tokens(moe):
    assert "Loss" in moe
    assert "Learning rate" in moe
    assert "Gradient norm" in moe
    # Four charts or more, and a map of the load for each MoE layer.
    assert moe.count("<svg") >= 6
    assert "layer 3" in moe
    assert "expert 1" in moe
    assert "dense" not in re.sub(r"<style>.*?</style>", "", moe, flags=re.DOTALL)


def test_the_page_begins_with_what_was_run(moe):
    places = [moe.index(f"<h2>{title}") for title in ("What was run", "What to look at", "Run<")]
    assert places == sorted(places) and moe.index("<svg") > places[-1]
    assert "learning rate 0.001" in moe[places[0] : places[1]]


def test_no_picture_is_shown_twice(tmp_path):
    # With one choice per token, a dropped assignment leaves its token without an expert.
    def alike(text):
        return re.sub(r'(id|clip-path|xlink:href)="[^"]*"', "", text)

    layers = [_layer(1, [0.5, 0.5]) | {"unrouted_fraction": 0.1}]
    page = _write(tmp_path / "top1", layers)
    shown = list(map(alike, re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)))
    assert len(set(shown)) == len(shown) > 4
    assert "Tokens without an expert" not in page
    other = _write(tmp_path / "top2", [_layer(1, [0.5, 0.5]) | {"unrouted_fraction": 0.05}])
    assert "Tokens without an expert" in other


def test_the_summary_has_the_rates_that_are_known():
    line = _train(1, [])
    assert "model FLOP/s, median" not in summary([line], {}, {})
    known = {**line, "model_flops_per_second": 2.5e12, "mfu": 0.25}
    rows = summary([line, known], {}, {})
    assert rows["model FLOP/s, median"] == "2.5e+12"
    assert rows["model FLOPs utilisation, median"] == "25.0%"


def test_parts_of_a_blend_have_losses_of_their_own(tmp_path):
    parts = {"web": {"loss": 1.5, "bits_per_byte": 1.25, "accuracy": 0.5}}
    with MetricsWriter(tmp_path) as writer:
        writer.write(_train(3, []))
        writer.write({"kind": "eval", "step": 2, "loss": 1.25, "layers": []})
        writer.write({"kind": "eval", "step": 3, "loss": 1.25, "layers": [], "parts": parts})
    report = _write(tmp_path, result=_RESULT | {"parts": parts})
    assert "validation loss, web" in report
    assert "1.5000 nats per token, 1.250 bits per byte" in report
    assert ">web<" in report  # the legend of the curve


def test_shows_scores_beside_baselines(moe):
    position = [moe.index(text) for text in ("1.500", "8.000", "2.250", "2.750")]
    assert position[0] == min(position)
    for text in ("123,456", "65,432", "98,765", "1.2500", "62.5%", "1 x imaginary"):
        assert text in moe


def test_escapes_what_tokens_and_names_hold(moe):
    assert "<script" not in moe
    assert "&lt;script&gt;" in moe
    assert "<b>" not in moe
    assert "&lt;b&gt;bold" in moe


def test_makes_white_space_visible(moe):
    assert "␣↵" in moe


def test_needs_no_network(moe):
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//""", moe)
    assert not re.search(r"""url\(\s*["']?(https?:)?//|@import|<link""", moe)


def test_addresses_are_names_of_xml_alone(moe):
    # Inside the page, or an image written into it.
    links = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]*)""", moe)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert not re.findall(r"https?://", re.sub(r'xmlns(:\w+)?="[^"]*"', "", moe))


def test_figures_are_whole_and_find_their_parts(moe):
    for text in re.findall(r"<svg.*?</svg>", moe, flags=re.DOTALL):
        ids = {element.get("id") for element in ElementTree.fromstring(text).iter()}
        assert set(re.findall(r"url\(#([^)]*)\)", text)) <= ids
        assert set(re.findall(r'xlink:href="#([^"]*)"', text)) <= ids


@pytest.mark.parametrize(
    ("piece", "shown"),
    [(" def", "␣def"), ("\n\t", "↵⇥"), ("<0x0A>", "↵"), ("<0xC3>", "<0xC3>"), ("\x07", "\\u0007")],
)
def test_visible(piece, shown):
    assert visible(piece) == shown


def test_the_noise_scale_has_a_chart_if_the_run_has_measured_it(tmp_path, moe):
    assert "Gradient noise scale" not in moe
    with MetricsWriter(tmp_path / "measured") as writer:
        for step in range(1, 41):
            # In the first step the noise hides the signal; a scale is 50 / 2 or more.
            noise = {"squared_gradient": 2.0 if step > 1 else -1.0, "trace": 50.0, "tokens": 64.0}
            writer.write(_train(step, []) | {"gradient_noise": noise})
    page = write_report(tmp_path / "measured").read_text()
    assert "Gradient noise scale" in page and "tokens, smoothed over a tenth of the run" in page


def test_gaps_in_records_leave_gaps_in_curves(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            layer = _layer(1, [0.5, 0.5])
            layer["losses"] = {"balance": float("nan")} if step == 2 else {"balance": 1.0}
            writer.write(_train(step, [layer]) | {"grad_norm": float("inf") if step == 2 else 1.0})
    assert "Gradient norm" in write_report(tmp_path).read_text()


def test_single_record_is_drawn(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(_train(1, [_layer(1, [1.0, 0.0])]))
    assert "Layer 1" in write_report(tmp_path).read_text()


def test_empty_folder_is_refused_in_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        write_report(tmp_path)


def test_long_run_of_many_experts_stays_small(tmp_path):
    rng = np.random.default_rng(0)
    loads = rng.dirichlet(np.ones(64), size=(4, 6))
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 301):
            layers = [_layer(i, load.tolist()) for i, load in enumerate(loads[step % 4])]
            writer.write(_train(step, layers))
    tokens = [{"layer": i, "experts": [[_piece("word")] * 12] * 64} for i in range(6)]
    (tmp_path / "expert_tokens.json").write_text(json.dumps({"layers": tokens}))
    path = write_report(tmp_path)
    assert path.stat().st_size < 2_000_000


def test_dense_model_is_called_dense(tmp_path):
    text = _write(tmp_path)
    assert "dense" in text
    assert "expert 0" not in text
    assert "Loss" in text


def test_unfinished_run_is_called_unfinished(tmp_path):
    text = _write(tmp_path, [_layer(1, [0.5, 0.5])], result=None)
    assert "not finished" in text
    assert "<svg" in text


def test_experts_are_shown_against_known_domains(tmp_path):
    layer = {
        "layer": 1,
        "mutual_information": 0.5,
        "share_of_domain": 0.7213,
        "purity": 0.875,
        "counts": [[3, 1], [0, 0]],
    }
    known = {"domains": 2, "token_information": 0.25, "layers": [layer]}
    _write(tmp_path, result=_RESULT | {"best_possible_loss": 1.125, "specialisation": known})
    text = write_report(tmp_path).read_text()
    assert "1.1250 nats per token" in text
    section = re.search(r'<section id="domains">.*?</section>', text, re.S)[0]
    for shown in ("0.250", "0.500", "72.1%", "87.5%", "--share: 75.0%", "--share: 0.0%"):
        assert shown in section


def test_other_text_has_no_domains_to_show(tmp_path):
    _write(tmp_path)
    assert 'id="domains"' not in write_report(tmp_path).read_text()


def test_the_page_is_read_in_a_browser(tmp_path):
    layers = [_layer(1, [0.5, 0.5]), _layer(3, [0.75, 0.25])]
    tokens = [{"layer": 3, "experts": [[_piece("a_long_token" * 3)] * 12, [_piece(" \n")]]}]
    _write(tmp_path, layers, tokens, name="a_run_with_a_long_name" * 3)
    short = tmp_path / "short"
    with MetricsWriter(short) as writer:
        writer.write(_train(4, []) | {"learning_rate": 0.0029253})
    with browser.started() as chromium:
        browser.check(chromium, tmp_path / "report.html")
        browser.check(chromium, write_report(short))
