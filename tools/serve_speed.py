"""Compares the engine with ``generate`` of ``transformers`` on the same weights.

``python -m tools.serve_speed`` writes one random model of Mixtral's shape (124 million parameters,
float32) as a folder of ``transformers``, and opens it in both libraries. Greedy tokens must agree.
It then measures both in alternating rounds and writes ``experiments/benchmarks/cpu_serving.json``
and the table of ``docs/benchmarks.md``. Each measure takes the fastest implementation
of experts and the fastest cache of ``transformers``. Nothing else should run meanwhile.

Both sides report the time of every token. A decoding step takes the median time between two tokens
while all requests decode.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from moe_jax.benchmark.peers import imported
from moe_jax.cli import common
from moe_jax.config.loading import experiment_of
from moe_jax.decoding import Sampling
from moe_jax.interop import huggingface
from moe_jax.models import Decoder
from moe_jax.serving import Engine, Request
from tools import record

VOCABULARY, REQUESTS, SHORT, LONG = 32000, 16, 32, 256
SHAPE = {
    "model.num_layers": 4,
    "model.width": 512,
    "model.num_heads": 8,
    "model.num_kv_heads": 2,
    "model.head_dim": 64,
    "model.mlp_dim": 1792,
    "model.compute_dtype": "float32",
    "model.moe.expert_dim": 1792,
}
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
CACHES = ("dynamic", "static")
_MARKS = ("<!-- serving -->\n", "<!-- end of serving -->")

Prompts = Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Answered:
    """The answers to some prompts.

    Attributes:
        tokens: Token ids of each answer.
        times: Seconds from the submission to the end of each step that samples for every request.
        total: Seconds until the last token.
    """

    tokens: list[list[int]]
    times: list[float]
    total: float

    @property
    def step(self) -> float:
        """Median seconds between two steps."""
        return statistics.median(np.diff(self.times).tolist())


# A function of prompts and of the number of tokens to sample after each.
Answer = Callable[[Prompts, int], Answered]


@dataclasses.dataclass(frozen=True)
class Measure:
    """One comparison.

    Attributes:
        name: Name in the table.
        prompts: Number of prompts.
        length: Number of tokens of each prompt.
        tokens: Number of tokens to sample after each.
        seconds: Function of the answers that returns what is compared.
        target: Least ratio of the seconds of ``transformers`` and of the engine.
        repeats: Number of answers in a round, of which the median counts.
    """

    name: str
    prompts: int
    length: int
    tokens: int
    seconds: Callable[[Answered], float]
    target: float
    repeats: int = 1


def _step(answered: Answered) -> float:
    return answered.step


def _first(answered: Answered) -> float:
    return answered.times[0]


def _total(answered: Answered) -> float:
    return answered.total


MEASURES = (
    Measure("decoding step, 1 request", 1, SHORT, 24, _step, 1.3),
    Measure(f"decoding step, {REQUESTS} requests", REQUESTS, SHORT, 32, _step, 2.0),
    Measure(f"first token after a prompt of {LONG}", 1, LONG, 1, _first, 1.0, 9),
    Measure(f"{REQUESTS} requests, whole answers", REQUESTS, SHORT, 32, _total, 2.0),
)


def prompts_of(rng: np.random.Generator, number: int, length: int) -> list[list[int]]:
    """Returns random prompts; equal ones would share their pages."""
    return rng.integers(3, VOCABULARY, (number, length)).tolist()


def engine_answers(engine: Engine) -> Answer:
    """Returns the function that answers by the engine."""

    def answer(prompts: Prompts, tokens: int) -> Answered:
        began = time.perf_counter()
        sampling = Sampling(tokens=tokens, temperature=0.0)
        numbers = [engine.submit(Request(tuple(prompt), sampling)) for prompt in prompts]
        found: dict[int, list[int]] = {number: [] for number in numbers}
        times = []
        while engine.waiting or engine.running:
            sampled = engine.step()
            if len(sampled) == len(prompts):
                times.append(time.perf_counter() - began)
            for token in sampled:
                found[token.request].append(token.token)
        total = time.perf_counter() - began
        return Answered([found[number] for number in numbers], times, total)

    return answer


def peer_answers(folder: Path) -> dict[str, Answer]:
    """Returns the functions that answer by ``transformers``, by experts and cache."""
    torch, transformers = imported("torch"), imported("transformers")
    model = transformers.MixtralForCausalLM.from_pretrained(folder).eval()

    def answer(experts: str, cache: str, prompts: Prompts, tokens: int) -> Answered:
        model.config._experts_implementation = experts
        times: list[float] = []

        def clock(ids: Any, scores: Any, **_: Any) -> Any:
            times.append(time.perf_counter() - began)
            return torch.zeros(len(ids), dtype=torch.bool)

        inputs = torch.tensor(prompts)
        began = time.perf_counter()
        with torch.inference_mode():
            ids = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                do_sample=False,
                max_new_tokens=tokens,
                eos_token_id=None,
                pad_token_id=0,
                stopping_criteria=[clock],
                cache_implementation=None if cache == "dynamic" else cache,
            )
        total = time.perf_counter() - began
        return Answered(ids[:, len(prompts[0]) :].tolist(), times, total)

    return {
        f"{experts}, {cache}": functools.partial(answer, experts, cache)
        for experts in IMPLEMENTATIONS
        for cache in CACHES
    }


def check_equal(ours: Answer, theirs: Answer) -> int:
    """Returns the number of greedy tokens that were compared.

    Raises:
        RuntimeError: If the tokens differ.
    """
    prompts = prompts_of(np.random.default_rng(1), 4, SHORT)
    found, expected = ours(prompts, SHORT).tokens, theirs(prompts, SHORT).tokens
    if found != expected:
        raise RuntimeError("the engine and transformers sample different greedy tokens")
    return sum(map(len, found))


def measured(
    measure: Measure, ours: Answer, peers: dict[str, Answer], rounds: int, seed: int
) -> dict[str, Any]:
    """Returns one row: median seconds of the engine and of the fastest peer, and their ratio.

    A first round warms up and selects the peers within a factor of 1.5 of the fastest.
    """
    rng = np.random.default_rng(seed)

    def seconds(answer: Answer, drawn: Sequence[Prompts]) -> float:
        answers = (answer(prompts, measure.tokens) for prompts in drawn)
        return statistics.median(map(measure.seconds, answers))

    def drawn() -> list[Prompts]:
        return [prompts_of(rng, measure.prompts, measure.length) for _ in range(measure.repeats)]

    for answer in (ours, *peers.values()):
        seconds(answer, drawn())
    first = {name: seconds(answer, drawn()) for name, answer in peers.items()}
    chosen = [name for name in peers if first[name] < 1.5 * min(first.values())]
    spent: dict[str, list[float]] = {name: [] for name in ("engine", *chosen)}
    for _ in range(rounds):
        prompts = drawn()
        spent["engine"].append(seconds(ours, prompts))
        for name in chosen:
            spent[name].append(seconds(peers[name], prompts))
    best = min(chosen, key=lambda name: statistics.median(spent[name]))
    ratios = [theirs / own for own, theirs in zip(spent["engine"], spent[best], strict=True)]
    return {
        "name": measure.name,
        "engine_seconds": statistics.median(spent["engine"]),
        "transformers_seconds": statistics.median(spent[best]),
        "transformers": best,
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "target": measure.target,
    }


def table(figures: dict[str, Any]) -> str:
    """Returns the table of all measures."""
    lines = [
        "| measure | engine, ms | transformers, ms | its fastest | ratio | range | target |\n",
        "|---|---|---|---|---|---|---|\n",
    ]
    for row in figures["rows"]:
        ours, theirs = (1e3 * row[f"{side}_seconds"] for side in ("engine", "transformers"))
        spread = f"{row['lowest']:.2f} to {row['highest']:.2f}"
        lines.append(
            f"| {row['name']} | {ours:.1f} | {theirs:.1f} | {row['transformers']} "
            f"| {row['ratio']:.2f} | {spread} | {row['target']:.1f} |\n"
        )
    return "".join(lines) + f"\nMedians of {figures['rounds']} rounds.{record.shared(figures)}\n"


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    record.define(values, "experiments/benchmarks/cpu_serving.json", "docs/benchmarks.md", 9)


def _saved(folder: Path) -> int:
    """Writes the random model; returns its number of parameters."""
    config = experiment_of("mixtral_8x7b", SHAPE).model
    model = Decoder(config, VOCABULARY, jax.random.key(0))  # type: ignore[arg-type]
    huggingface.save(model, folder, "mixtral")
    return sum(leaf.size for leaf in jax.tree.leaves(model))


def main(given: flags.FlagValues) -> None:
    """Measures both libraries and writes figures and table."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        parameters = _saved(folder)
        engine = Engine(huggingface.load(folder).model, REQUESTS, 2 * LONG, prefill=LONG)
        ours = engine_answers(engine)
        peers = peer_answers(folder)
        compared = check_equal(ours, peers["eager, dynamic"])
        rows = []
        for seed, measure in enumerate(MEASURES):
            rows.append(measured(measure, ours, peers, given.rounds, seed))
            print(json.dumps(rows[-1]), flush=True)
    figures = {
        "parameters": parameters,
        "versions": {name: imported(name).__version__ for name in ("jax", "torch", "transformers")},
        "equal_tokens": compared,
        "rows": rows,
    }
    record.save(given, figures, table, _MARKS)


if __name__ == "__main__":
    common.run(define, main)
