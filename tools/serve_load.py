"""Measures ``moe-jax serve`` under load: bursts of requests of mixed lengths, and bad requests.

``python -m tools.serve_load`` writes a small Mixtral with random weights, starts the command on
loopback and asks every distinct request alone first. Then clients send the requests in bursts, and
every answer is compared with the one that its request had alone. Some clients leave in the middle
of a stream, and bad requests follow. ``serve_load.json`` has the throughput, the latencies, and the
memory of the server once a second, and ``docs/serving.md`` has a table of them. ``--minutes=10``
sends bursts for at least that time.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import jax
import numpy as np
import tokenizers
from absl import flags

from moe_jax import models
from moe_jax.cli import common
from moe_jax.files import write_json
from moe_jax.interop.huggingface import FAMILIES, save
from tools.plans import write_table
from tools.serve_requests import Answer, Ask, asks, mistakes, sent

CONTEXT, VOCAB, SLOTS = 256, 256, 16
# Seconds between bursts, seconds between looks at the memory, and seconds until an idle server.
_PAUSE, _LOOK, _IDLE = 0.5, 1.0, 60.0
_MARKS = ("<!-- load -->\n", "<!-- end of load -->")
_ORIGINAL = {
    "model_type": "mixtral",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}


@dataclasses.dataclass(frozen=True)
class Load:
    """Size of the load.

    Attributes:
        clients: Number of clients, each with one request at a time.
        requests: Smallest number of requests.
        minutes: Shortest time of the load in minutes.
        bad: Number of bad requests after the load.
        distinct: Number of distinct requests.
    """

    clients: int = 64
    requests: int = 1000
    minutes: float = 0.0
    bad: int = 500
    distinct: int = 100


def write_model(folder: Path) -> None:
    """Writes a Mixtral with random weights, whose tokens are the words ``t0``, ``t1``, ...

    So the text of an answer has all its token ids.
    """
    model = models.make(FAMILIES["mixtral"].read(_ORIGINAL), VOCAB, jax.random.key(0))
    save(model, folder, "mixtral", original=_ORIGINAL)
    words = {f"t{i}": i for i in range(VOCAB)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="t0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.save(str(folder / "tokenizer.json"))
    special = '{"bos_token": "t1", "eos_token": "t2", "pad_token": "t0", "unk_token": "t0"}'
    (folder / "tokenizer_config.json").write_text(special)


@contextlib.contextmanager
def serving(folder: Path, queue: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Runs ``moe-jax serve`` in the block; yields its process and its address."""
    code = "from moe_jax.cli.main import main; main('serve')"
    sizes = [f"--slots={SLOTS}", f"--queue={queue}", f"--context={CONTEXT}", "--port=0"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, f"--model={folder}", *sizes],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if " is at " not in line:
            raise RuntimeError("moe-jax serve has not started: its messages have the reason")
        yield process, line.split()[-1]
    finally:
        process.terminate()
        process.wait()


def resident(process: int) -> float:
    """Returns the resident memory of a process in MiB, as Linux counts it."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextlib.asynccontextmanager
async def watched(process: int) -> AsyncIterator[list[float]]:
    """Yields the memory of a process in MiB, to which each second of the block adds a value."""
    values = [resident(process)]

    async def look() -> None:
        while True:
            await asyncio.sleep(_LOOK)
            values.append(resident(process))

    task = asyncio.create_task(look())
    try:
        yield values
    finally:
        task.cancel()


async def bursts(http: httpx.AsyncClient, distinct: list[Ask], load: Load) -> list[Answer]:
    """Sends requests in bursts of 1 to ``2 * clients``; returns all answers.

    A twentieth of the requests are left by their clients at their first token.
    """
    rng, free = random.Random(1), asyncio.Semaphore(load.clients)
    began, tasks = time.monotonic(), list[asyncio.Task[Answer]]()

    async def one(ask: Ask) -> Answer:
        async with free:
            return await sent(http, ask)

    while len(tasks) < load.requests or time.monotonic() - began < 60 * load.minutes:
        for _ in range(rng.randint(1, 2 * load.clients)):
            ask = rng.choice(distinct)
            leaves = rng.random() < 0.05
            ask = dataclasses.replace(ask, stream=True, leaves=True) if leaves else ask
            tasks.append(asyncio.create_task(one(ask)))
        await asyncio.sleep(_PAUSE)
        while sum(not task.done() for task in tasks) > load.clients:
            await asyncio.sleep(_PAUSE)
    return [*await asyncio.gather(*tasks)]


async def idle(http: httpx.AsyncClient) -> bool:
    """Returns True once no request runs or waits, and False if that takes a minute."""
    last = time.monotonic() + _IDLE
    while time.monotonic() < last:
        found = (await http.get("/load")).json()
        if not found["running"] and not found["waiting"]:
            return True
        await asyncio.sleep(0.1)
    return False


async def bad(http: httpx.AsyncClient, number: int) -> dict[str, int]:
    """Sends bad requests; returns the number of answers of each status."""
    statuses: dict[str, int] = {}
    headers = {"Content-Type": "application/json"}
    for content in mistakes(number, CONTEXT):
        found = await http.post("/v1/completions", content=content, headers=headers)
        line = found.json()["error"]["message"]
        status = str(found.status_code) if line and "\n" not in line else "without a line"
        statuses[status] = statuses.get(status, 0) + 1
    return statuses


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Returns the 50th, 95th and 99th percentile in seconds."""
    found = np.percentile(seconds, [50, 95, 99]).tolist()
    return {name: round(value, 4) for name, value in zip(("p50", "p95", "p99"), found, strict=True)}


def flat(mebibytes: list[float]) -> dict[str, float]:
    """Returns the mean memory of the second and of the last quarter of the load, in MiB."""
    quarters = np.array_split(np.asarray(mebibytes), 4)
    means = [float(part.mean()) if len(part) else mebibytes[-1] for part in quarters]
    return {
        "first": round(mebibytes[0], 1),
        "second_quarter": round(means[1], 1),
        "last_quarter": round(means[3], 1),
    }


def figures(answers: list[Answer], alone: dict[Ask, str], seconds: float) -> dict[str, Any]:
    """Returns the figures of the load; an answer without its end counts as lost.

    Args:
        answers: Answers of the load.
        alone: Text that each request had alone.
        seconds: Duration of the load.
    """
    left = [answer for answer in answers if answer.ask.leaves]
    whole = [answer for answer in answers if not answer.ask.leaves]
    ended = [answer for answer in whole if answer.ended]
    tokens = sum(answer.tokens for answer in ended)
    return {
        "requests": len(answers),
        "seconds": round(seconds, 1),
        "requests_per_second": round(len(answers) / seconds, 2),
        "tokens_per_second": round(tokens / seconds, 1),
        "latency_seconds": percentiles([answer.seconds for answer in ended]),
        "first_token_seconds": percentiles([a.first for a in ended if a.ask.stream]),
        "clients_left": len(left),
        "lost": len(whole) - len(ended),
        "problems": sorted({answer.problem for answer in whole if not answer.ended}),
        "wrong": sum(answer.text != alone[answer.ask] for answer in ended),
    }


async def measure(process: int, url: str, load: Load) -> dict[str, Any]:
    """Returns all figures of a server."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        distinct = asks(load.distinct, CONTEXT, VOCAB)
        alone = {ask: (await sent(http, ask)).text for ask in distinct}
        began = time.monotonic()
        async with watched(process) as memory:
            answers = await bursts(http, distinct, load)
        found = figures(answers, alone, time.monotonic() - began)
        found["idle_after_clients_left"] = await idle(http)
        found["bad_requests"] = await bad(http, load.bad)
        again = {ask: (await sent(http, ask)).text for ask in distinct[:5]}
        found["wrong_after_bad_requests"] = sum(alone[ask] != again[ask] for ask in again)
        found["health"] = (await http.get("/health")).status_code
    return {**found, "memory_mib": flat(memory), "memory_mib_by_second": _thinned(memory)}


def _thinned(memory: list[float]) -> list[int]:
    """Returns at most 60 values, evenly spread."""
    return [round(value) for value in memory[:: -(-len(memory) // 60)]]


def run(load: Load) -> dict[str, Any]:
    """Starts the server, sends the load and returns the figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "small"
        write_model(folder)
        with serving(folder, queue=load.clients) as (process, url):
            return asyncio.run(measure(process.pid, url, load))


def table(found: dict[str, Any]) -> str:
    """Returns the table of a page."""
    bad, memory = found["bad_requests"], found["memory_mib"]
    first, second, last = (round(memory[k]) for k in ("first", "second_quarter", "last_quarter"))
    rows = {
        f"requests in {found['seconds']:.0f} seconds": f"{found['requests']:,}, of which "
        f"{found['clients_left']:,} were left by their clients",
        "lost answers, answers that differ": f"{found['lost']}, {found['wrong']}",
        "tokens per second": f"{found['tokens_per_second']:,.0f}",
        "latency p50, p95, p99": _seconds(found["latency_seconds"]),
        "time to the first token p50, p95, p99": _seconds(found["first_token_seconds"]),
        "resident memory at the start, in the second and in the last quarter": f"{first}, {second} "
        f"and {last} MiB",
        "bad requests with status 400, with status 413, health after them": f"{bad.get('400', 0)}, "
        f"{bad.get('413', 0)}, status {found['health']}",
    }
    lines = (f"| {name} | {value} |\n" for name, value in rows.items())
    return "| figure | value |\n|---|---|\n" + "".join(lines)


def _seconds(percentiles: dict[str, float]) -> str:
    return "{p50:.2f}, {p95:.2f} and {p99:.2f} seconds".format(**percentiles)


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("output", "docs/serve_load.json", "File of the result.", flag_values=values)
    flags.DEFINE_string("page", "docs/serving.md", "Page of the table.", flag_values=values)
    for name, meaning in (
        ("clients", "Number of clients."),
        ("requests", "Smallest number of requests."),
        ("bad", "Number of bad requests."),
        ("distinct", "Number of distinct requests, each of which is asked alone first."),
    ):
        default = getattr(Load, name)
        flags.DEFINE_integer(name, default, meaning, lower_bound=1, flag_values=values)
    flags.DEFINE_float(
        "minutes", Load.minutes, "Shortest time of the load.", lower_bound=0.0, flag_values=values
    )


def main(given: flags.FlagValues) -> None:
    """Measures the server and writes the result."""
    names = [field.name for field in dataclasses.fields(Load)]
    load = Load(**{name: getattr(given, name) for name in names})
    shape = {"clients": load.clients, "slots": SLOTS, "context": CONTEXT}
    device = f"{os.cpu_count()} x {jax.devices()[0].device_kind}"
    found = {"device": device, **shape, **run(load)}
    write_json(Path(given.output), found)
    write_table(Path(given.page), table(found), _MARKS)


if __name__ == "__main__":
    common.run(define, main)
