import dataclasses

import numpy as np
import pytest
from PIL import Image

from moe_jax.ablation import figures
from moe_jax.ablation.ablation import Effect, Gate
from moe_jax.ablation.judgement import judged
from moe_jax.ablation.overlay import FittedCoefficient
from moe_jax.ablation.report import few_seeds, markdown, minutes_of, write_report
from moe_jax.ablation.verdicts import CONTRADICTED, MISSING, REPRODUCED
from tests.ablation.records import FULL, STEPS, divergent, record, records


def report(ablation=FULL, lines=None):
    lines = records() if lines is None else lines
    return markdown(ablation, lines, judged(ablation, lines), "a command")


def test_published_effects_have_the_sign_of_what_is_measured():
    better, sooner, equal, domains = FULL.claims
    assert FULL.effect(better) == Effect(0.2, "A paper, table 1")
    assert FULL.effect(sooner) == Effect(None, "A figure")
    assert FULL.effect(equal) == Effect(0.3, "")
    assert FULL.effect(domains) == Effect(None, "")
    assert str(FULL.effect(better)) == "+0.2, A paper, table 1"
    # An accuracy is not a loss, and its difference not a loss's.
    other = dataclasses.replace(FULL, published=FULL.published[2:])
    assert other.effect(better).value is None


def test_a_report_has_published_beside_measured_as_differences():
    text = report()
    assert "`a command`: 6 runs, 3 paired seeds, 9 min of run time." in text
    assert "| switch | -1.5 | -0.2 | 2.1000 ± 0.1000 | -1.0033 ± 0.0143 |" in text
    assert "| switch | 800 | 0.50 | 50 | 0.50 |" in text
    assert "| switch | 81.5 | +1.5 |" in text
    assert "| switch | 2 | -1.0033 ± 0.0143 | -0.100 | -0.100 |" in text
    assert "| halved | 0.50 | switch | dense | -1.0033 ± 0.0143 |" in text
    assert "| theirs | 0.50 | 60 | 80 | 0.750 | A paper, table 2 |" in text
    assert "| fewer bits | 0.25 | 0.7 | 0.8 | 0.875 | A paper, table 3 |" in text
    assert "J per FLOP" in text
    assert "* A longer run says the same." in text


def test_a_report_has_speed_load_and_steps_to_the_threshold():
    header, _, dense, switch = report().split("\n\n")[3].splitlines()
    columns = [cell.strip() for cell in header.split("|")[1:-1]]
    row = dict(zip(columns, (cell.strip() for cell in switch.split("|")[1:-1]), strict=True))
    assert row["tokens_per_second"] == "50"
    assert row["ratio"] == "0.50"
    assert row["steps_to"] == "30"
    assert row["max_violation"] == "0.5000"
    assert row["load_entropy"] == "0.9000"
    assert "purity" not in row  # no arm has it
    assert dense.startswith("| dense | 1,000 | 2,000 | 3.1033 ± ")


def test_a_report_has_fitted_coefficients_beside_published_ones():
    def drop(places, losses):
        assert places == list(FULL.overlay.places.values())
        return losses[1] - losses[0]

    coefficient = FittedCoefficient("fall of the loss", "A paper, table 4", -0.5, drop)
    overlay = dataclasses.replace(FULL.overlay, coefficients=(coefficient,))
    ablation = dataclasses.replace(FULL, overlay=overlay)
    row = "| fall of the loss | A paper, table 4 | -0.5 | -1.0033 ± 0.0143 |"
    assert row in report(ablation)
    assert "the 3 seeds that have every arm" in report(ablation)
    # A seed without one of the arms does not count, and one seed has no interval.
    assert "the 2 seeds that have every arm" in report(ablation, records()[:-1])
    assert "fall of the loss" not in report(ablation, records(seeds=1))


def test_claims_without_measurements_are_shown_without_a_verdict():
    text = report()
    verdicts = [found.text for found in judged(FULL, records())]
    assert verdicts == [REPRODUCED, REPRODUCED, CONTRADICTED]
    assert f"| and knows domains | purity: switch - dense |  |  | {MISSING} |" in text
    known = [{**line, "purity": 0.9 if line["arm"] == "switch" else 0.5} for line in records()]
    assert len(judged(FULL, known)) == 4


def test_claims_about_loss_are_shown_in_training_loss_too():
    assert "in training loss" not in report()  # where no record has it
    # A nat apart in validation, half a nat in training.
    lines = [{**line, "train_loss": line["loss"] / 2} for line in records()]
    better = next(line for line in report(lines=lines).splitlines() if "Switch is better" in line)
    assert better.endswith("| +1.0033 ± 0.0143 | **reproduced** | +0.5017 ± 0.0072 |")
    sooner = next(line for line in report(lines=lines).splitlines() if "and sooner" in line)
    assert sooner.endswith("| **reproduced** |  |")


def test_too_few_seeds_are_said():
    assert few_seeds(FULL, records(seeds=2)) == []
    one = records(seeds=1)
    assert "Too few seeds: 1 of 2" in report(lines=one)
    assert "95 %" in report(lines=one)
    assert judged(FULL, one) == []
    assert few_seeds(FULL, [*records(), record(FULL, "dense", 3, 1.0)]) == []


def test_equal_runs_are_paid_for_once():
    lines = records(seeds=1)
    assert minutes_of([lines[0], lines[0], lines[1]]) == pytest.approx(3.0)


def test_an_arm_alone_makes_a_report():
    lines = [line for line in records() if line["arm"] == "switch"]
    text = report(lines=lines)
    assert "| dense |" not in text
    assert "steps_to |" not in text
    assert "| halved |" not in text
    assert "experts.\n\n| published | size |" in text


def test_what_made_the_runs_is_said_where_they_say_it():
    assert "Trained at" not in report()
    about = {"commit": "0123456789abc", "versions": {"python": "3.11.7", "jax": "0.10.2"}}
    lines = [line | about for line in records()]
    lines[0] |= {"commit": None, "versions": {"python": "3.12.1", "jax": "0.10.2"}}
    assert (
        "Trained at 012345678, no commit with jax 0.10.2, python 3.11.7, python 3.12.1."
        in report(lines=lines)
    )


def test_runs_that_diverged_are_shown(tmp_path):
    dense = [line for line in records() if line["arm"] == "dense"]
    lines = [*dense, *(divergent(FULL, "switch", seed, 10 * seed) for seed in range(3))]
    text = report(lines=lines)
    ends = "0 (seed 0), 10 (seed 1), 20 (seed 2)"
    assert f"`switch` diverged: loss or gradient stayed non-finite after step {ends}." in text
    assert "| switch | 1,000 | 2,000 | diverged |" in text
    assert "| switch | -1.5 | -0.2 | diverged |  |" in text
    contradicted = "**contradicted: switch diverges** |"
    assert f"| loss: dense - switch | +0.2, A paper, table 1 |  | {contradicted}" in text
    write_report(FULL, lines, "a command", tmp_path)
    assert not (tmp_path / "effects.png").exists()  # there is no number to draw
    # The seed that has no curve does not keep the arm out of the legend.
    curves = figures.drawn(FULL, lines, judged(FULL, lines))["curves"]
    assert "switch" in [text.get_text() for text in curves.axes[0].get_legend().get_texts()]

    # An arm without a speed has no place in the panel of seconds.
    steps, seconds = curves.axes
    assert len(steps.lines) > len(seconds.lines) == 1
    assert seconds.lines[0].get_xdata()[-1] == pytest.approx(STEPS * 10 / 100)

    one = [*records()[:-1], divergent(FULL, "switch", 2, 20)]
    assert "| switch | 1,000 | 2,000 | 2.0500 ± 0.0707 (2 of 3 seeds) |" in report(lines=one)
    assert "not resolved at this scale" in report(lines=one)
    write_report(FULL, one, "a command", tmp_path)
    assert (tmp_path / "effects.png").exists()


def test_figures_are_png_files_with_a_palette(tmp_path):
    write_report(FULL, records(), "a command", tmp_path)
    names = {"curves", "against", "overlay", "sizes", "effects"}
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.md",
        *(f"{name}.png" for name in names),
    }
    for path in tmp_path.glob("*.png"):
        assert Image.open(path).mode == "P"  # a palette
        assert f"]({path.name})" in (tmp_path / "report.md").read_text()
    again = tmp_path / "again"
    again.mkdir()
    write_report(FULL, records(), "a command", again)
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_a_registered_report_names_commit_looks_and_failed_gates():
    gate = Gate("the dense model beats zlib", "dense", "bits_above_zlib", most=0.0)
    registered = dataclasses.replace(FULL, registered="0123456789abcdef", gates=(gate,))
    lines = [line | {"bits_above_zlib": 0.1} for line in records(registered, seeds=4)]
    text = markdown(registered, lines, judged(registered, lines), "a command")
    assert "Registered at 012345678. " in text
    assert "99.95% with 4 seeds, 98.85% with 8 seeds, 96.40% with 12 seeds" in text
    assert "0 of 1 gates passed. Failed: the dense model beats zlib." in text
    assert "**not testable here: the dense model beats zlib**" in text
    assert "Too few seeds" not in text


@pytest.mark.parametrize(
    ("threshold", "seeds", "expected"),
    [("switch", {0}, "switch"), ("", {0}, "dense"), ("", {1}, "")],
)
def test_curves_are_compared_with_the_threshold_arm_or_the_first(threshold, seeds, expected):
    ablation = dataclasses.replace(FULL, threshold_arm=threshold)
    lines = [record(FULL, "dense", 0, 3.0)]
    lines += [record(FULL, "switch", seed, 2.0) for seed in seeds]
    assert figures.baseline(ablation, lines) == expected


def test_curves_of_further_training_are_compared_with_each_other():
    # The first arm trains for 40 steps, and the two others go on for 4 steps each.
    arms = {"dense": 40, "switch": 4, "gshard": 4}
    ablation = dataclasses.replace(FULL, threshold_arm="", arms=FULL.arms | {"gshard": {}})
    lines = [record(ablation, arm, 0, 3.0, steps=steps) for arm, steps in arms.items()]
    assert figures.baseline(ablation, lines) == "switch"


def test_sizes_are_drawn_relative_to_the_unchanged_model_with_a_colour_per_method():
    ours, theirs = figures.drawn(FULL, records(), judged(FULL, records()))["sizes"].axes
    (measured,) = ours.containers
    assert measured.lines[0].get_xydata() == pytest.approx(np.array([[0.5, -1.0033], [1, 0]]), 1e-4)
    halved, bits, _ = theirs.lines
    assert halved.get_xydata().tolist() == [[0.5, 0.75], [1.0, 1.0]]
    assert bits.get_ydata() == pytest.approx([0.875, 1.0])
    assert measured.lines[0].get_color() == halved.get_color() != bits.get_color()
    assert [text.get_text() for text in theirs.get_legend().get_texts()] == ["theirs", "fewer bits"]
    one = [line for line in records() if line["arm"] == "switch"]
    empty = figures.drawn(FULL, one, [])["sizes"].axes[0]
    assert empty.get_legend() is None and not empty.containers
