"""Measures drafts: a small model with a lookahead module, alone and with every source of drafts.

``python -m tools.draft_speed`` trains a model with a lookahead module and a smaller draft model on
the quickstart's data. It samples from the first without drafts, with n-gram lookup, with the draft
model and with the lookahead module, greedily and at temperature 0.8. The variants take turns, and
their tokens must agree. It writes ``experiments/benchmarks/drafts.json`` and the table of
``docs/serving.md``.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from moe_jax.cli import common
from moe_jax.models import Decoder
from moe_jax.run.api import train
from moe_jax.run.opened import open_folder
from moe_jax.run.sampling import check_continues
from moe_jax.serving import DraftModel, Engine, LookaheadModule, NGram, Speculation
from tools import record
from tools.offload_speed import answered, in_turns, prompts_of

ALONE = "no drafts"
TEMPERATURES = (0.0, 0.8)
MODEL = {
    "model.width": 256,
    "model.mlp_dim": 1024,
    "model.moe.expert_dim": 1024,
    "model.lookahead": 1,
    "data.batch_size": 4,
}
DRAFT = {"model.num_layers": 2, "model.width": 64, "data.batch_size": 4}
_MARKS = ("<!-- draft speed -->\n", "<!-- end of draft speed -->")


@dataclasses.dataclass(frozen=True)
class Plan:
    """One source of drafts.

    Attributes:
        name: Name in the table.
        speculation: The source; ``None`` drafts nothing.
    """

    name: str
    speculation: Speculation | None


def plans_of(draft: Decoder) -> list[Plan]:
    """Returns the sources to compare."""
    return [
        Plan(ALONE, None),
        Plan("n-gram lookup, 4 tokens", Speculation(NGram(), 4)),
        Plan("draft model, 4 tokens", Speculation(DraftModel(draft), 4)),
        Plan("draft model, 2 tokens", Speculation(DraftModel(draft), 2)),
        Plan("lookahead module, 1 token", Speculation(LookaheadModule(), 1)),
    ]


def measured(
    model: Decoder,
    plans: Sequence[Plan],
    prompts: Sequence[tuple[int, ...]],
    tokens: int,
    rounds: int,
) -> list[dict[str, Any]]:
    """Returns a row per temperature and plan, from rounds in which the plans take turns.

    Raises:
        RuntimeError: If two plans give different tokens.
    """
    rows = []
    for temperature in TEMPERATURES:
        length = max(map(len, prompts)) + tokens
        engines = [Engine(model, 1, length, 16, speculation=plan.speculation) for plan in plans]
        for engine in engines:
            answered(engine, prompts, tokens, 0, temperature)
        seconds = in_turns(engines, prompts, tokens, rounds, temperature)
        rows += [
            _row(temperature, plan, engine, own, seconds[0], tokens * len(prompts))
            for plan, engine, own in zip(plans, engines, seconds, strict=True)
        ]
    return rows


def _row(
    temperature: float,
    plan: Plan,
    engine: Engine,
    own: Sequence[float],
    alone: Sequence[float],
    sampled: int,
) -> dict[str, Any]:
    """Returns the figures of one plan; the counts of its engine include the warm-up."""
    ratios = [without / spent for without, spent in zip(alone, own, strict=True)]
    drafts = engine.drafts
    return {
        "temperature": temperature,
        "name": plan.name,
        "tokens_per_second": sampled / statistics.median(own),
        "speed_up": statistics.median(ratios),
        "acceptance": drafts.acceptance if drafts.proposed else None,
        "tokens_per_step": drafts.tokens_per_step,
    }


def table(figures: dict[str, Any]) -> str:
    """Returns the table of all plans."""
    lines = [
        "| temperature | drafts | accepted | tokens per step | tokens/s | speed-up |\n",
        "|---|---|---|---|---|---|\n",
    ]
    for row in figures["rows"]:
        accepted = row["acceptance"]
        cells = [f"{row['temperature']:g}", row["name"]]
        cells += ["–" if accepted is None else f"{accepted:.2f}", f"{row['tokens_per_step']:.2f}"]
        cells += [f"{row['tokens_per_second']:.0f}", f"{row['speed_up']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |\n")
    return (
        "".join(lines)
        + f"\nThe model has {figures['parameters'] / 1e6:.1f} million parameters and the draft "
        f"model {figures['draft_parameters'] / 1e6:.1f} million. The speeds are medians of "
        f"{figures['rounds']} rounds of {figures['sampled']} tokens, one request at a time."
        f"{record.shared(figures)}\n"
    )


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    record.define(values, "experiments/benchmarks/drafts.json", "docs/serving.md", 5)
    for name, size, meaning in (
        ("steps", 600, "Number of steps of each training."),
        ("tokens", 64, "Number of tokens after each prompt."),
    ):
        flags.DEFINE_integer(name, size, meaning, lower_bound=1, flag_values=values)


def _parameters(model: Decoder) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(model))


def main(given: flags.FlagValues) -> None:
    """Trains both models, measures all plans and writes figures and table."""
    opened = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, changes in (("model", MODEL), ("draft", DRAFT)):
            folder = Path(temporary) / name
            train("quickstart", folder, changes | {"training.steps": given.steps}, say=print)
            opened.append(open_folder(folder, None, check_continues))
    model, draft = (each.model for each in opened)
    tokenizer = opened[0].tokenizer
    assert isinstance(model, Decoder) and isinstance(draft, Decoder) and tokenizer is not None
    prompts = prompts_of(tokenizer)
    figures = {
        "steps": given.steps,
        "parameters": _parameters(model),
        "draft_parameters": _parameters(draft),
        "sampled": given.tokens * len(prompts),
        "rows": measured(model, plans_of(draft), prompts, given.tokens, given.rounds),
    }
    record.save(given, figures, table, _MARKS)


if __name__ == "__main__":
    common.run(define, main)
