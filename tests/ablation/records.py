"""Made-up results, so that reports need no training."""

import dataclasses

from moe_jax.ablation.ablation import Ablation, Claim, Published
from moe_jax.ablation.overlay import Overlay
from moe_jax.ablation.runner import fingerprint
from moe_jax.ablation.sizes import MeasuredSeries, PublishedSeries, QualityBySize
from tests.ablation.tiny_ablation import ABLATION

STEPS = 40
# A whole ablation: a threshold, an overlay, sizes and what else may be asked for.
FULL = dataclasses.replace(
    ABLATION,
    scales={
        "cpu": {"training.steps": STEPS},
        "gpu": {"training.steps": STEPS, "data.batch_size": 32},
    },
    published=(
        Published(
            "A paper, table 1",
            "large",
            "negative log perplexity",
            {"dense": -1.7, "switch": -1.5},
            measures="loss",
            negated=True,
        ),
        Published(
            "A paper, table 1",
            "large",
            "examples/s",
            {"dense": 1600, "switch": 800},
            "tokens_per_second",
        ),
        Published("Another paper", "large", "accuracy", {"dense": 80.0, "switch": 81.5}),
    ),
    claims=(
        Claim("Switch is better", "loss", "switch", "dense"),
        Claim("and sooner", "steps_to", "switch", "dense", paper="A figure"),
        Claim("and equal", "loss", "switch", "dense", 0.01, True, published=0.3),
        Claim("and knows domains", "purity", "dense", "switch"),
    ),
    threshold_arm="dense",
    against=("tokens", "flops", "energy"),
    overlay=Overlay(
        "experts",
        {"dense": 1, "switch": 2},
        {"A series": {1: 1.7, 2: 1.6, 8: 1.5}},
        {"A law": lambda experts: 2.0 - 0.1 * experts},
    ),
    sizes=QualityBySize(
        {"halved": MeasuredSeries("halve", "dense", {0.5: "switch"})},
        {
            "theirs": PublishedSeries("halve", "A paper, table 2", {1.0: 80.0, 0.5: 60.0}),
            "fewer bits": PublishedSeries("quantise", "A paper, table 3", {0.25: 0.7, 1.0: 0.8}),
        },
    ),
    notes=("A longer run says the same.",),
)


def record(ablation: Ablation, arm, seed, loss, speed=100.0, **more):
    """A run whose training loss falls in a line to its loss."""
    return {
        "arm": arm,
        "seed": seed,
        "scale": "cpu",
        "config": fingerprint(ablation.experiment(arm, "cpu", seed)),
        "parameters": 1000,
        "flops_per_token": 2000,
        "training_flops": 6000 * STEPS * 10,
        "steps": STEPS,
        "tokens": STEPS * 10,
        "seconds": 90.0,
        "device": "1 x cpu",
        "loss": loss,
        "dropped": 0.0,
        "max_violation": 0.5,
        "load_entropy": 0.9,
        "tokens_per_second": speed,
        "curve": [[step, loss + 4.0 * (1 - step / STEPS)] for step in range(1, STEPS + 1)],
        **more,
    }


def divergent(ablation: Ablation, arm, seed, step):
    """A run that is lost after ``step``."""
    line = record(ablation, arm, seed, 3.0, diverged=step)
    measured = ("loss", "dropped", "max_violation", "load_entropy", "tokens_per_second")
    kept = {key: value for key, value in line.items() if key not in measured}
    return kept | {"curve": line["curve"][:step]}


def records(ablation: Ablation = FULL, seeds=3):
    """Switch is a nat ahead, at half the speed."""
    return [
        record(
            ablation, arm, seed, loss + 0.1 * seed + 0.01 * (seed == 1) * (arm == "dense"), speed
        )
        for seed in range(seeds)
        for arm, loss, speed in (("dense", 3.0, 100.0), ("switch", 2.0, 50.0))
    ]
