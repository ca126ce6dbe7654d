import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest

from moe_jax.counting import laws
from moe_jax.counting.laws import DENSE, HASH, MOE, PUBLISHED, RL_R, S_BASE
from moe_jax.errors import ConfigError
from tools import scaling_laws

CLARK = {"S_BASE": S_BASE, "RL_R": RL_R, "HASH": HASH}

# Within the last printed digit of the exponents (half up), where the paper must have rounded.
SHARP = dataclasses.replace(MOE, alpha=0.1145, beta=0.1467)


@pytest.mark.parametrize(
    "law, size, losses",
    [
        (S_BASE, 15e6, (3.19, 2.99, 2.76, 2.61)),
        (S_BASE, 130e6, (2.69, 2.55, 2.39, 2.28)),
        (S_BASE, 1.3e9, (2.24, 2.15, 2.05, 1.98)),
        (HASH, 15e6, (3.18, 3.03, 2.78, 2.59)),
    ],
)
def test_clark_losses(law, size, losses):
    predicted = law.loss(size, np.array([1, 8, 64, 512]))
    np.testing.assert_allclose(predicted, losses, rtol=0, atol=0.01)


@pytest.mark.parametrize("size, ends", [(15e6, (3.15, 2.6)), (1.3e9, (2.30, 2.0))])
def test_clark_losses_as_read_off_the_figure(size, ends):
    np.testing.assert_allclose(S_BASE.loss(size, np.array([1, 512])), ends, rtol=0, atol=0.07)


def test_clark_by_hand():
    # log10(1e6) = 6 and, at one expert, log10(1.847) = .26647.
    exponent = -0.082 * 6 - 0.108 * 0.26647 + 0.009 * 6 * 0.26647 + 1.104
    assert S_BASE.loss(1e6, 1) == pytest.approx(10**exponent, rel=1e-5)


@pytest.mark.parametrize("law", CLARK.values(), ids=CLARK)
def test_effective_experts_start_rise_and_saturate(law):
    effective = law.effective_experts(np.array([1, 2, 8, 64, 512, 1e9]))
    assert effective[0] == pytest.approx(law.e_start)
    assert np.all(np.diff(effective) > 0)
    assert effective[-1] == pytest.approx(law.e_max, rel=1e-5)
    assert np.all(effective < law.e_max)


def test_effective_parameters_of_the_papers_example():
    # The paper says about 55M; its coefficients, of three decimals, give 51.8M.
    found = S_BASE.effective_parameters(5e6, 128)
    assert found == pytest.approx(51.8e6, rel=0.002)
    assert found == pytest.approx(55e6, rel=0.07)


@pytest.mark.parametrize("law", CLARK.values(), ids=CLARK)
@pytest.mark.parametrize("size", [15e6, 1.3e9, 30e9])
@pytest.mark.parametrize("experts", [1, 8, 512])
def test_effective_parameters_have_the_same_loss(law, size, experts):
    found = law.effective_parameters(size, experts)
    assert law.loss(found, 1) == pytest.approx(law.loss(size, experts), rel=1e-9)
    assert found == pytest.approx(size) if experts == 1 else found > size


@pytest.mark.parametrize("law", CLARK.values(), ids=CLARK)
def test_published_cutoff_is_within_the_rounding_of_the_coefficients(law):
    half = 0.0005
    low, high = (-law.b - half) / (law.c + half), (-law.b + half) / (law.c - half)
    assert 10**low < law.n_cutoff < 10**high
    # Where equation 8's slope in experts is 0 by the printed coefficients, more experts do nothing.
    level = 10 ** (-law.b / law.c)
    assert law.loss(level, 1) == pytest.approx(law.loss(level, 512))
    assert law.no_gain == min(level, law.n_cutoff)


@pytest.mark.parametrize("law", CLARK.values(), ids=CLARK)
def test_effective_parameters_are_refused_beyond_the_cutoff(law):
    assert law.effective_parameters(0.99 * law.no_gain, 64) > 0.99 * law.no_gain
    with pytest.raises(ConfigError, match=r"^params=.* is beyond the cutoff of .*$"):
        law.effective_parameters(law.no_gain, 64)


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row.flops:.0e}")
def test_krajewski_flops(row):
    # Three digits, the last within one: the sizes are printed with one or two.
    unit = 10 ** (math.floor(math.log10(row.flops)) - 2)
    assert abs(round(row.predicted_flops() / unit) - round(row.flops / unit)) <= 1
    assert row.predicted_flops() == pytest.approx(row.flops, rel=0.005)


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row.flops:.0e}")
def test_krajewski_losses(row):
    assert 0.011 < row.loss - row.predicted_loss() < 0.0235
    # Exponents that print as the published ones take the whole deviation away.
    assert (f"{SHARP.alpha + 1e-9:.3f}", f"{SHARP.beta:.3f}") == ("0.115", "0.147")
    assert row.predicted_loss(SHARP) == pytest.approx(row.loss, abs=0.001)


def test_krajewski_losses_are_of_total_parameters():
    for row in PUBLISHED:
        for params in (row.active_params, 64 * row.active_params):
            assert abs(MOE.loss(params, row.tokens, row.granularity) - row.loss) > 0.025


@pytest.mark.parametrize(
    "active, tokens, losses",
    [
        (25e6, 66e9, (3.109, 3.045, 3.003, 2.974, 2.955)),
        (3e6, 16e9, (3.80, 3.72, 3.67, 3.63, 3.61)),
    ],
)
def test_krajewski_granularity(active, tokens, losses):
    total = laws.total_parameters(laws.blocks_of(active))
    found = MOE.loss(total, tokens, np.array([1, 2, 4, 8, 16]))
    np.testing.assert_allclose(found, losses, rtol=0, atol=0.01)


def test_krajewski_granularity_as_read_off_figure_3a():
    total = laws.total_parameters(laws.blocks_of(25e6))
    found = MOE.loss(total, 66e9, np.array([1, 16]))
    np.testing.assert_allclose(found, (3.12, 2.95), rtol=0, atol=0.012)


def test_dense_law_has_no_granularity():
    assert DENSE.loss(1e9, 2e10, 1) == DENSE.loss(1e9, 2e10, 16)
    assert DENSE.loss(1e9, 2e10) == pytest.approx(0.47 + 16.3 / 1e9**0.126 + 26.7 / 2e10**0.127)


def test_parameters_and_flops_by_hand():
    # Two blocks of width 128: 12 * 128^2 = 196,608 active and (4 + 8 * 64) * 128^2 in total each.
    assert laws.active_parameters(2) == 2 * 196_608
    assert laws.blocks_of(2 * 196_608) == pytest.approx(2)
    assert laws.total_parameters(2) == 2 * 516 * 16_384
    assert laws.total_parameters(2, 1) == laws.active_parameters(2)
    # Per token and block: 6 * 196,608 = 1,179,648; routing over 64 * 4 experts 14 * 128 * 256.
    assert laws.flops(2, 10, 4) == 20 * (1_179_648 + 458_752)
    assert laws.flops(2, 10, 4, experts=1) == 20 * 1_179_648


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row.flops:.0e}")
def test_search_finds_the_published_optima(row):
    found = laws.compute_optimal(row.flops)
    assert found.granularity == row.granularity
    # A whole number of blocks, of which the size is the cube: 8% at the smallest, 13 blocks.
    assert found.active_params == pytest.approx(row.active_params, rel=0.09)
    assert found.tokens == pytest.approx(row.tokens, rel=0.08)
    assert found.loss == pytest.approx(row.loss, abs=0.025)
    assert found.loss <= row.predicted_loss() + 0.001


def test_search_spends_the_budget_and_leaves_nothing_better():
    found = laws.compute_optimal(1e20)
    assert isinstance(found.blocks, int)
    assert laws.flops(found.blocks, found.tokens, found.granularity) == pytest.approx(1e20)
    assert found.total_params == laws.total_parameters(found.blocks)
    for blocks in (found.blocks - 1, found.blocks + 1):
        for granularity in (found.granularity / 2, found.granularity, found.granularity * 2):
            tokens = 1e20 / laws.flops(blocks, 1, granularity)
            assert MOE.loss(laws.total_parameters(blocks), tokens, granularity) > found.loss


def test_search_is_over_the_given_granularities():
    assert laws.compute_optimal(1e20, granularities=(1, 3)).granularity == 3
    coarse = laws.compute_optimal(1e20, granularities=(1,))
    assert coarse.loss > laws.compute_optimal(1e20).loss
    assert laws.compute_optimal(1e20, DENSE).granularity == 1


def test_savings_over_dense():
    assert laws.saving(1e20) == pytest.approx(20, rel=0.1)
    # The paper says over 40; its printed coefficients give 32.
    assert laws.saving(1e25) == pytest.approx(32.0, abs=0.1)


BAD = [
    (lambda: S_BASE.loss(0, 8), "params=0 must be a finite number above 0"),
    (lambda: S_BASE.loss(-1e6, 8), "params=-1000000.0 must be a finite number above 0"),
    (lambda: S_BASE.loss("1B", 8), "params='1B' must be a finite number above 0"),
    (lambda: S_BASE.loss(1e9, 0.5), "experts=0.5 must be a finite number of at least 1"),
    (
        lambda: S_BASE.effective_parameters(math.nan, 8),
        "params=nan must be a finite number above 0",
    ),
    (lambda: dataclasses.replace(S_BASE, e_max=1.0), "e_max=1.0 must be above e_start=1.847"),
    (
        lambda: dataclasses.replace(MOE, experts=0),
        "experts=0 must be a finite number of at least 1",
    ),
    (lambda: MOE.loss(1e9, 0), "tokens=0 must be a finite number above 0"),
    (lambda: MOE.loss(1e9, 1e9, 0.5), "granularity=0.5 must be a finite number of at least 1"),
    (lambda: laws.flops(0, 1e9), "blocks=0 must be a finite number above 0"),
    (lambda: laws.total_parameters(2, 0), "experts=0 must be a finite number of at least 1"),
    (lambda: laws.blocks_of(None), "active_params=None must be a finite number above 0"),
    (lambda: laws.compute_optimal(math.inf), "budget=inf must be a finite number above 0"),
    (lambda: laws.compute_optimal(1e3), "budget=1000 FLOPs is too small for the search"),
    (lambda: laws.compute_optimal(1e40), "budget=1e+40 FLOPs is too large for the search"),
    (lambda: laws.compute_optimal(1e20, MOE, ()), "granularities is empty; name at least one"),
    (
        lambda: laws.compute_optimal(1e20, MOE, (0,)),
        "granularity=0 must be a finite number of at least 1",
    ),
]


@pytest.mark.parametrize("call, message", BAD, ids=[message for _, message in BAD])
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ConfigError) as refusal:
        call()
    assert str(refusal.value) == message


def test_whole_numbers_and_arrays_are_taken():
    assert laws.compute_optimal(10**25).flops == 1e25
    assert MOE.loss(10**13, np.array([10**12, 10**13])).shape == (2,)


def test_command_prints_the_tables_and_draws(tmp_path):
    folder = tmp_path / "new" / "folder"
    command = [sys.executable, "-m", "tools.scaling_laws", f"--output={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == scaling_laws.report() + "\n"
    assert "| S-BASE | 15M | 3.191 (15M) | 2.985 (34.7M) |" in done.stdout
    assert "| 64 x 1T | 7.94T | 64 | 4.97e+25 | 4.98e+25 | +0.22% | 1.367 | 1.356 | -0.011 |" in (
        done.stdout
    )
    assert (folder / "scaling_laws.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in folder.iterdir()} == {"scaling_laws.png"}


def test_figure_has_a_panel_per_law():
    left, right = scaling_laws.figure().axes
    assert len(left.lines) == 6
    assert len(right.lines) == 4
    dense, coarse, fine = (line.get_ydata() for line in right.lines[:3])
    assert np.all(dense > coarse)
    assert np.all(coarse > fine)
