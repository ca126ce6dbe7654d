"""Numbers in the prose of pages are those of the records of ablations.

A row holds a sentence of a page with places for numbers, and the numbers from the records. Records
that change without the page, or the reverse, fail here.
"""

import json
from pathlib import Path
from statistics import fmean

import pytest

ROOT = Path(__file__).parents[2]


def by_seed(ablation, arm, metric="loss"):
    """A metric of an arm by seed."""
    lines = (ROOT / f"experiments/results/{ablation}/results.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {record["seed"]: record[metric] for record in records if record["arm"] == arm}


def mean(ablation, arm, metric="loss"):
    """The mean of a metric over the seeds of an arm."""
    return fmean(by_seed(ablation, arm, metric).values())


def higher(ablation, arm, than):
    """How much higher the loss of an arm is than another's, in nats, over the seeds of both."""
    losses, others = by_seed(ablation, arm), by_seed(ablation, than)
    return fmean(losses[seed] - others[seed] for seed in losses.keys() & others.keys())


HALVES = ("load_8", "output_8", "loss_8", "merged_8")
AFTER = [f"{arm}_recovered" for arm in HALVES]


def rows():
    """Yields page, sentence and numbers."""
    page = "changing_models"
    found = higher("upcycling", "dense_further", "upcycled")
    yield page, "ends with a loss {:.2f} nats lower than the dense model", [found]
    from_scratch = higher("upcycling", "scratch", "upcycled")
    redrawn = higher("upcycling", "upcycled", "upcycled_redrawn")
    words = (
        "ends {:.2f} nats higher, and redrawing half of the hidden units lowers the loss by {:.2f}"
    )
    yield page, words, [from_scratch, redrawn]
    halves = [higher("compression", arm, "e16") for arm in HALVES]
    words = "the loss of half of the experts is {:.1f} to {:.1f} nats higher"
    yield page, words, [min(halves), max(halves)]
    after = [higher("compression", arm, "trained_further") for arm in AFTER]
    yield page, "the steps of training it is {:.2f} to {:.2f} nats higher", [min(after), max(after)]
    yield page, "and of four bits {:.2f}.", [higher("compression", "int4", "e16")]
    yield from of_adaptation()
    yield from of_specialisation()
    yield from of_stages()
    gains = [
        higher("pilot_regime", "dense_1e-2", "glam_e16"),
        higher("pilot_regime", "dense_1e-2", "dense_double"),
    ]
    words = "16 experts lower the loss by {:.2f} nats and twice the tokens by {:.2f}"
    yield "ablation_rules", words, gains


def of_adaptation():
    arms = ("all", "all_but_experts", "adapters_everywhere", "adapters", "experts", "router")
    words = (
        "all weights end at {:.2f} nats per token, all but experts at {:.2f}, adapters of all maps "
        "at {:.2f}, adapters of experts at {:.2f}, experts alone at {:.2f} and the router alone at "
        "{:.2f}; the model starts at {:.2f}. On Python, whose loss was {:.2f} before, the router "
        "alone forgets least without replay ({:.2f})."
    )
    others = (*arms, "before", "e16", "router_on_code")
    yield "fine_tuning", words, [mean("adaptation", arm) for arm in others]
    words = (
        "end at {:.2f} and all weights at {:.2f}, so they forget more; at the rate of the weights, "
        "adapters end at {:.2f} and forget less"
    )
    others = ("adapters_on_code", "all_on_code", "adapters_slowly_on_code")
    yield "fine_tuning", words, [mean("adaptation", arm) for arm in others]


def of_specialisation():
    arms, name = ("switch", "glam", "expert_choice", "hash"), "specialisation_routers"
    words = (
        "the experts of Switch tell {:.2f} nats of the language, the experts of GLaM {:.2f}, of "
        "expert choice {:.2f}, and of a hash of the token {:.2f};"
    )
    yield "looking_inside", words, [mean(name, arm, "mutual_information") for arm in arms]
    words = (
        "tell {:.2f} nats with a balance loss in each sequence, {:.2f} with one over the batch, "
        "and {:.2f} with a bias in place of the loss"
    )
    spans = ("sequence", "batch", "bias")
    yield "looking_inside", words, [mean(name, arm, "mutual_information") for arm in spans]
    words = (
        "The loss rises by {:.1f} nats without the best expert of GShard's 16 and by {:.1f} nats "
        "without the best 4 of 63 fine-grained ones"
    )
    rises = [
        higher("deepseek_removed_experts", "gshard_1.5_without_1", "gshard_1.5"),
        higher("deepseek_removed_experts", "fine_without_4", "fine"),
    ]
    yield "looking_inside", words, rises


def of_stages():
    words = (
        "a factor that rises from 1 to 2 is {:.2f} nats better than one that falls, and a balance "
        "loss that starts at 0 is {:.2f} nats worse than a constant one"
    )
    better = higher("schedules", "capacity_falls", "capacity_rises")
    worse = higher("schedules", "balance_rises", "capacity_2")
    yield "stages", words, [better, worse]
    words = (
        "All weights forget {:.1f} nats of Python and gain {:.1f} on the languages; four new "
        "experts beside frozen ones forget {:.1f} and gain {:.1f}; a quarter of replayed Python "
        "forgets {:.1f} and gains {:.1f}."
    )
    changes = [
        change
        for code, text in (
            ("all_on_code", "all"),
            ("grown_on_code", "grown"),
            ("replay_on_code", "replay_on_languages"),
        )
        for change in (higher("continual", code, "e16"), higher("continual", "before", text))
    ]
    yield "stages", words, changes
    words = "the model forgets {:.1f} nats more and learns {:.2f} nats less"
    more = higher("continual", "router_frozen_on_code", "all_on_code")
    yield "stages", words, [more, higher("continual", "router_frozen", "all")]


@pytest.mark.parametrize(("page", "words", "numbers"), rows())
def test_a_sentence_has_the_numbers_of_the_records(page, words, numbers):
    text = " ".join((ROOT / f"docs/{page}.md").read_text().split())
    assert words.format(*numbers) in text
