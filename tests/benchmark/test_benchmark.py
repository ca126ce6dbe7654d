"""The benchmark measures only right layers, on a given routing; no test looks at a time."""

import dataclasses
import json

import numpy as np
import pytest

from moe_jax.benchmark import attention, layers, peers, products, report, steps
from moe_jax.benchmark.candidate import Call, Candidate, CannotRun
from moe_jax.benchmark.given import choices_of, problem
from moe_jax.benchmark.measure import Measurement, interleaved, measure
from moe_jax.benchmark.oracle import error
from moe_jax.benchmark.shapes import shape, shapes
from moe_jax.cli import bench, common
from moe_jax.errors import ConfigError

TINY = shape("tiny")
ROW = Measurement("tiny", "zipf", "experts", "a", "", "", "forward", "float32", ceiling_share=0.5)


def test_useful_flops_are_6_or_18_of_gated_experts_and_4_or_12_of_others():
    each = 64 * 2 * 16 * 32  # T K M F
    assert [TINY.flops(backward) / each for backward in (False, True)] == [6, 18]
    plain = dataclasses.replace(TINY, gated=False)
    assert [plain.flops(backward) / each for backward in (False, True)] == [4, 12]
    scaled = {one.flops(True) for name, one in shapes().items() if name.startswith("scaling_e")}
    assert len(scaled) == 1
    assert shapes()["mixtral_8x7b"].flops(False) == pytest.approx(5.77e12, rel=1e-3)
    assert shapes()["switch_base_128"].flops(True) == pytest.approx(1.86e12, rel=1e-2)


def test_regimes_have_the_load_of_their_name():
    def load(regime, empty=1):
        found = choices_of(regime, 600, 8, 2, empty, np.random.default_rng(0))
        assert all(len({*row}) == 2 for row in found.tolist())  # no expert twice
        return np.bincount(found.ravel(), minlength=8)

    assert load("balanced").tolist() == [150] * 8
    assert load("one_hot")[0] == 600
    assert (load("empty", 3) == 0).tolist() == [False] * 5 + [True] * 3
    assert load("zipf")[0] > 3 * load("zipf")[-1]
    assert 100 < load("uniform").min() <= load("uniform").max() < 200


def test_the_plan_of_the_logits_is_the_given_routing():
    one = problem(TINY, "zipf", "float32")
    layer = layers._layer(one, layers._Way("ragged"))
    plan = layer.config.router(one.logits[None], capacity=TINY.tokens)
    weights = np.zeros((TINY.tokens, TINY.experts), np.float32)
    np.put_along_axis(weights, one.choices, one.gates, axis=1)
    np.testing.assert_allclose(plan.combine[0].sum(-1), weights, atol=1e-6)


def rows(part, name, regime="one_hot", one=TINY):
    every = [*layers.candidates(), *peers.candidates()]
    chosen = [c for c in every if c.part == part and c.name == name]
    return measure(problem(one, regime, "float32"), chosen, part, ["forward_backward"], 1)


@pytest.mark.parametrize(
    ("part", "start"),
    [
        ("experts", "moe_jax/ragged/loop"),
        ("experts", "moe_jax/gather"),
        ("layer", "moe_jax/ragged/loop"),
    ],
)
def test_own_layers_agree_with_the_oracle(part, start):
    (row,) = rows(part, start)
    assert row.skipped == ""
    assert row.error < 1e-5
    assert row.repeats
    assert row.p20 <= row.p50 <= row.p80
    assert row.memory > 0
    assert row.regime == ("one_hot" if part == "experts" else "router")


def test_layers_without_a_gate_agree_with_the_oracle():
    plain = dataclasses.replace(TINY, k=1, gated=False, activation="relu")
    (row,) = rows("experts", "moe_jax/ragged/loop", "empty", plain)
    assert (row.skipped, row.error < 1e-5) == ("", True)


@pytest.mark.parametrize("part", ["experts", "layer"])
def test_peers_agree_with_the_oracle(part):
    pytest.importorskip("torch")
    pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    (row,) = rows(part, "transformers/eager")
    assert (row.skipped, row.error < 1e-5) == ("", True)


def test_a_candidate_that_cannot_run_or_is_wrong_has_a_reason_and_no_time():
    def refuses(problem, backward):
        raise CannotRun("needs a moon")

    def breaks(problem, backward):
        raise RuntimeError("first line\nsecond line")

    def lies(problem, backward):
        return Call(lambda: None, lambda _: {"y": 2 * problem.x})

    chosen = [Candidate(f.__name__, "experts", f) for f in (refuses, breaks, lies)]
    found = measure(problem(TINY, "balanced", "float32"), chosen, "experts", ["forward"], 1)
    said = [row.skipped for row in found]
    assert said[:2] == ["needs a moon", "failed: first line"]
    assert said[2].startswith("wrong: relative error")
    assert [row.p50 for row in found] == [None] * 3
    assert "- (needs a moon)" in report.table(found)
    with pytest.raises(CannotRun, match="no_such_library is not installed"):
        peers.imported("no_such_library.part")


def test_capacity_1_is_measured_where_it_drops_nothing():
    (row,) = rows("experts", "moe_jax/gather/capacity_1", "balanced")
    assert (row.skipped, row.error < 1e-5) == ("", True)
    (row,) = rows("experts", "moe_jax/gather/capacity_1", "zipf")
    assert row.skipped == "drops tokens of this regime"
    (row,) = rows("layer", "moe_jax/gather/capacity_1")
    assert (row.skipped, row.error, row.repeats, row.p50 > 0) == ("", None, None, True)


@pytest.mark.parametrize("mask", ["causal", "window"])
def test_attention_agrees_with_whole_scores(mask):
    sizes = attention.Sizes(heads=4, kv_heads=2, length=600, depth=8)
    found = attention.measure_attention((), "float32", ["forward_backward"], 1, sizes)
    by_name = {row.name: row for row in found if row.regime == mask}
    blocks, splash = by_name["moe_jax/blocks"], by_name["moe_jax/splash"]
    assert (blocks.skipped, blocks.error < 1e-5, blocks.repeats) == ("", True, True)
    assert splash.skipped == "it runs on tpu and not on cpu"


def test_grouped_products_agree_with_those_of_single_experts():
    found = products.measure_products(TINY, ("moe_jax", "pallas"), "float32", 1)
    by_name = {(row.name, row.direction): row for row in found}
    assert {kind for _, kind in by_name} == {"rows", "transposed", "outer"}
    for kind in products.KINDS:
        for name in ("blocks", "loop", "ragged_dot"):
            row = by_name[f"moe_jax/{name}", kind]
            assert (row.skipped, row.error < 1e-5, row.repeats) == ("", True, True)
        assert by_name["moe_jax/tokamax", kind].skipped == "needs a gpu"
        kernel = by_name["pallas/128x128x64x4", kind]
        assert kernel.skipped.endswith("jax.experimental.pallas.ops.gpu needs a Hopper GPU")


def test_train_steps_start_with_the_same_losses():
    pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    names = ("moe_jax/auto", "transformers/eager")
    found = {row.name: row for row in steps.measure_steps(names, "float32", 1)}
    assert [found[name].skipped for name in names] == ["", ""]
    assert max(found[name].error for name in names) < 1e-5
    assert found["moe_jax/auto/capacity_1.25"].error is None


def test_a_figure_shows_measured_rows(tmp_path):
    other = dataclasses.replace(ROW, name="b", direction="forward_backward")
    report.draw([ROW, other, dataclasses.replace(ROW, ceiling_share=None)], tmp_path / "f.svg")
    assert "forward_backward" in (tmp_path / "f.svg").read_text()


def test_rounds_are_interleaved_after_a_warm_up():
    order, ticks = [], iter(range(100))
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = interleaved(calls, 2, clock=lambda: next(ticks))
    assert "".join(order) == "ababab"
    assert times == {"a": [1, 1], "b": [1, 1]}


def test_an_error_is_relative_by_norm_and_nan_is_infinite():
    wanted = {"y": np.array([3.0, 4.0]), "x": np.array([1.0])}
    assert error({"y": np.array([3.0, 4.5])}, wanted) == pytest.approx(0.1)
    assert error({"y": wanted["y"], "x": np.array([np.nan])}, wanted) == float("inf")


def test_a_baseline_fails_beyond_the_factor(tmp_path):
    path = tmp_path / "baseline.jsonl"
    path.write_text(report.lines([ROW], "a device"))
    assert json.loads(path.read_text())["device"] == "a device"
    baseline = report.read_baseline(path)
    assert report.slower([dataclasses.replace(ROW, ceiling_share=0.48)], baseline) == []
    (line,) = report.slower([dataclasses.replace(ROW, ceiling_share=0.47)], baseline)
    assert line == "tiny zipf experts a forward float32: 47.0% of the ceiling, 50.0% before"
    assert report.slower([dataclasses.replace(ROW, name="new")], baseline) == []
    gone = dataclasses.replace(ROW, ceiling_share=None, skipped="wrong")
    assert report.slower([gone], baseline) == ["tiny zipf experts a forward float32: wrong"]
    path.write_text("{}\n")
    with pytest.raises(ConfigError, match="holds no lines of moe-jax bench"):
        report.read_baseline(path)


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        common.run(bench.define, bench.main, ["moe-jax bench", *arguments])
    return stop.value.code


@pytest.mark.parametrize(
    ("flag", "fault"),
    [
        ("--shapes=mixtral_8x7", "no shape is called 'mixtral_8x7'; did you mean 'mixtral_8x7b'"),
        ("--regimes=even", "--regimes has no 'even': use balanced, uniform, zipf, one_hot, empty"),
        ("--directions=back", "--directions has no 'back'"),
        ("--parts=", "--parts has no ''"),
        ("--candidates=tensor", "--candidates: no name starts with 'tensor'"),
        ("--baseline=/no/such/file", "/no/such/file"),
        ("--dtype=int8", "int8"),
        ("--figure=shares.gif", "--figure=shares.gif is neither .png nor .svg"),
    ],
)
def test_a_bad_flag_is_one_line(flag, fault, capsys):
    assert run("--shapes=tiny", flag) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert fault in line
    assert captured.out == ""


def test_the_command_writes_lines_and_fails_against_a_baseline(tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    baseline = tmp_path / "baseline.jsonl"
    fast = dataclasses.replace(ROW, name="moe_jax/gather", ceiling_share=1e9)
    baseline.write_text(report.lines([fast], "a device"))
    chosen = ("--regimes=zipf", "--parts=experts", "--directions=forward", "--rounds=1")
    files = (f"--output={output}", f"--baseline={baseline}")
    assert run("--shapes=tiny", *chosen, "--candidates=moe_jax/gather", *files) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("slower than --baseline: tiny zipf experts moe_jax/gather forward")
    record, dropping = map(json.loads, output.read_text().splitlines())
    assert record["error"] < 1e-5
    assert dropping["skipped"] == "drops tokens of this regime"
    assert "moe_jax/gather" in captured.out
