"""Measures an engine whose experts do not all fit on the device.

``python -m tools.offload_speed`` trains a small model of the quickstart's data with 16 experts per
layer, or opens the folder ``--model``. It samples from it with all experts on the device and with
budgets of 100, 50, 25 and 12 % of their bytes: with the default policy and prediction, with plain
LRU, and without prefetch. The variants take turns, and their tokens must agree. It writes
``experiments/benchmarks/offload.json`` and the table of ``docs/serving.md``.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import flags

from moe_jax.cli import common
from moe_jax.data import Tokenizer
from moe_jax.decoding import Sampling
from moe_jax.models import Decoder
from moe_jax.offload import LeastRecentlyUsed, NoPrediction, OffloadCounts, arrays_of
from moe_jax.run.api import train
from moe_jax.run.opened import open_folder
from moe_jax.run.sampling import check_continues
from moe_jax.serving import Engine, Offload, Request
from moe_jax.serving.asking import encoded
from tools import record

SHARES = (1.0, 0.5, 0.25, 0.12)
WHOLE = "all on the device"
CHANGES = {
    "model.width": 256,
    "model.moe.every": 1,
    "model.moe.num_experts": 16,
    "model.moe.expert_dim": 256,
    "data.batch_size": 4,
}
TEXTS = ("def ", "import ", "class Error(", "    return ")
_MARKS = ("<!-- offload speed -->\n", "<!-- end of offload speed -->")


@dataclasses.dataclass(frozen=True)
class Plan:
    """One way to hold the experts.

    Attributes:
        name: Name in the table.
        share: Share of the experts' bytes that the device holds.
        offload: The budget; ``None`` holds all experts without a cache.
    """

    name: str
    share: float
    offload: Offload | None


def plans_of(total: int) -> list[Plan]:
    """Returns the ways to compare, for experts of ``total`` bytes together."""
    found = [Plan(WHOLE, 1.0, None)]
    for share in SHARES:
        budget = Offload(int(share * total))
        without = dataclasses.replace(budget, predictor=NoPrediction())
        found += [
            Plan("least stale, prefetch", share, budget),
            Plan("LRU, prefetch", share, dataclasses.replace(budget, policy=LeastRecentlyUsed())),
            Plan("least stale, no prefetch", share, without),
            Plan(
                "LRU, no prefetch",
                share,
                dataclasses.replace(without, policy=LeastRecentlyUsed()),
            ),
        ]
    return found


def prompts_of(tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """Returns the prompts as token ids."""
    return [encoded(tokenizer, text) for text in TEXTS]


def answered(
    engine: Engine,
    prompts: Sequence[tuple[int, ...]],
    tokens: int,
    seed: int,
    temperature: float = 0.8,
) -> tuple[list[int], float]:
    """Returns all sampled tokens of one request after the other, and the seconds they took."""
    began, found = time.perf_counter(), []
    for number, prompt in enumerate(prompts):
        engine.submit(Request(prompt, Sampling(tokens, temperature, seed=seed + number)))
        while engine.waiting or engine.running:
            found += [token.token for token in engine.step()]
    return found, time.perf_counter() - began


def in_turns(
    engines: Sequence[Engine],
    prompts: Sequence[tuple[int, ...]],
    tokens: int,
    rounds: int,
    temperature: float = 0.8,
) -> list[list[float]]:
    """Returns the seconds of each engine in each round, in which the engines take turns.

    Raises:
        RuntimeError: If two engines give different tokens.
    """
    seconds: list[list[float]] = [[] for _ in engines]
    for number in range(rounds):
        expected = None
        for engine, own in zip(engines, seconds, strict=True):
            found, spent = answered(engine, prompts, tokens, 100 * (number + 1), temperature)
            expected = expected or found
            if found != expected:
                raise RuntimeError("two engines sample different tokens of one model")
            own.append(spent)
    return seconds


def difference(after: OffloadCounts, before: OffloadCounts) -> OffloadCounts:
    """Returns the counts between two moments."""
    pairs = zip(dataclasses.astuple(after), dataclasses.astuple(before), strict=True)
    return OffloadCounts(*(now - then for now, then in pairs))


def measured(
    model: Decoder,
    plans: Sequence[Plan],
    prompts: Sequence[tuple[int, ...]],
    tokens: int,
    rounds: int,
) -> list[dict[str, Any]]:
    """Returns a row per plan, from rounds in which the plans take turns.

    Raises:
        RuntimeError: If two plans give different tokens.
    """
    length = max(map(len, prompts)) + tokens
    engines = [Engine(model, 1, length, 16, offload=plan.offload) for plan in plans]
    for engine in engines:
        answered(engine, prompts, tokens, 0)
    before = [engine.offloaded for engine in engines]
    seconds = in_turns(engines, prompts, tokens, rounds)
    sampled = tokens * len(prompts)
    return [
        _row(plan, engine, then, sampled / statistics.median(own), sampled * rounds)
        for plan, engine, then, own in zip(plans, engines, before, seconds, strict=True)
    ]


def _row(
    plan: Plan, engine: Engine, before: OffloadCounts | None, speed: float, sampled: int
) -> dict[str, Any]:
    """Returns the figures of one plan."""
    row = {"name": plan.name, "share": plan.share, "tokens_per_second": speed}
    if engine.offloaded is None or before is None:
        return row
    counts = difference(engine.offloaded, before)
    return row | {
        "hit_rate": counts.hit_rate,
        "accuracy": counts.accuracy if counts.predicted else None,
        "bytes_per_token": counts.bytes_moved / sampled,
        "stall_ms_per_token": 1e3 * counts.stall_seconds / sampled,
    }


def table(figures: dict[str, Any]) -> str:
    """Returns the table of all plans."""
    lines = [
        "| experts on the device | policy | tokens/s | hit rate | predictions that were right "
        "| MB per token | stall, ms per token |\n",
        "|---|---|---|---|---|---|---|\n",
    ]
    for row in figures["rows"]:
        cells = [f"{row['share']:.0%}", row["name"], f"{row['tokens_per_second']:.0f}"]
        if "hit_rate" in row:
            right = row["accuracy"]
            cells += [f"{row['hit_rate']:.3f}", "–" if right is None else f"{right:.3f}"]
            cells += [f"{row['bytes_per_token'] / 1e6:.2f}", f"{row['stall_ms_per_token']:.2f}"]
        else:
            cells += ["–"] * 4
        lines.append(f"| {' | '.join(cells)} |\n")
    return (
        "".join(lines)
        + f"\nThe experts have {figures['expert_bytes'] / 1e6:.0f} MB. The speeds are medians of "
        f"{figures['rounds']} rounds of {figures['sampled']} tokens, one request at a time."
        f"{record.shared(figures)}\n"
    )


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    record.define(values, "experiments/benchmarks/offload.json", "docs/serving.md", 5)
    flags.DEFINE_string(
        "model", "", "Folder of a trained model; by default one is trained.", flag_values=values
    )
    for name, size, meaning in (
        ("steps", 300, "Number of steps of the training."),
        ("tokens", 64, "Number of tokens after each prompt."),
    ):
        flags.DEFINE_integer(name, size, meaning, lower_bound=1, flag_values=values)


def main(given: flags.FlagValues) -> None:
    """Measures all plans and writes figures and table."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.model or temporary
        if not given.model:
            changes = CHANGES | {"training.steps": given.steps}
            train("quickstart:gshard", folder, changes, say=print)
        opened = open_folder(folder, None, check_continues)
    model, tokenizer = opened.model, opened.tokenizer
    assert isinstance(model, Decoder) and tokenizer is not None
    layers = arrays_of(model, np.dtype(jnp.dtype(model.config.compute_dtype)))
    total = sum(x.nbytes for layer in layers for own in layer for x in own.values())
    prompts = prompts_of(tokenizer)
    rows = measured(model, plans_of(total), prompts, given.tokens, given.rounds)
    figures = {
        "steps": None if given.model else given.steps,
        "expert_bytes": total,
        "sampled": given.tokens * len(prompts),
        "rows": rows,
    }
    record.save(given, figures, table, _MARKS)


if __name__ == "__main__":
    common.run(define, main)
