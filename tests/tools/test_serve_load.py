"""The load test: its figures by hand, a few clients of a scripted generator, and a real server."""

import asyncio
import json
import os
from pathlib import Path

import pytest

pytest.importorskip("httpx", reason="openai is not installed")
pytest.importorskip("starlette", reason="pip install 'moe_jax[serve]'")
pytest.importorskip("tokenizers", reason="pip install 'moe_jax[hf]'")

from tests.serving.test_app import site  # noqa: E402
from tools import serve_load  # noqa: E402
from tools.serve_load import CONTEXT, VOCAB, Load, figures, flat, measure, run  # noqa: E402
from tools.serve_requests import Answer, Ask, asks, mistakes  # noqa: E402


def test_figures_count_lost_and_wrong_answers():
    greedy = Ask((3,), 2, 0.0, 0, stream=False)
    stream = Ask((4,), 2, 0.0, 0, stream=True)
    leaves = Ask((4,), 2, 0.0, 0, stream=True, leaves=True)
    answers = [
        Answer(greedy, "t5 t6", 2, True, 1.0, 1.0),
        Answer(greedy, "t5 t7", 2, True, 3.0, 3.0),  # wrong
        Answer(stream, "t8", 2, True, 0.5, 2.0),
        Answer(stream, "t8", 0, False, 0.5, 9.0),  # lost
        Answer(leaves, "", 0, False, 0.1, 0.1),
    ]
    found = figures(answers, {greedy: "t5 t6", stream: "t8"}, seconds=2.0)
    assert (found["wrong"], found["lost"], found["clients_left"]) == (1, 1, 1)
    assert (found["requests_per_second"], found["tokens_per_second"]) == (2.5, 3.0)
    assert found["latency_seconds"]["p50"] == 2.0  # of 1, 2 and 3; the lost answer has no end
    assert found["first_token_seconds"]["p99"] == 0.5


def test_memory_is_compared_between_quarters():
    expected = {"first": 1.0, "second_quarter": 4.0, "last_quarter": 7.5}
    assert flat([1.0, 2.0, 3.0, 5.0, 6.0, 6.0, 7.0, 8.0]) == expected


def test_requests_fit_and_differ():
    found = asks(40, CONTEXT, VOCAB)
    assert len({*found}) == 40 and max(len(ask.prompt) for ask in found) > 64
    assert all(len(ask.prompt) + ask.tokens <= CONTEXT for ask in found)
    assert sum(ask.temperature == 0 for ask in found) == sum(ask.stream for ask in found) == 20


def test_mistakes_are_no_requests():
    for content in mistakes(10, CONTEXT):
        try:
            body = json.loads(content)
        except (ValueError, RecursionError):
            continue
        prompt = body["prompt"]
        too_long = len(prompt) > CONTEXT if isinstance(prompt, list | str) else True
        unknown = prompt in ([999999], "\ud800")
        assert too_long or unknown or body.get("max_tokens", 1) < 1 or body.get("n", 1) > 1


def healthy(found, bad):
    """Checks that all answers came, and that each of the bad requests was refused."""
    assert (found["lost"], found["wrong"], found["wrong_after_bad_requests"]) == (0, 0, 0)
    assert {*found["bad_requests"]} == {"400", "413"}
    assert sum(found["bad_requests"].values()) == bad
    assert found["health"] == 200 and found["idle_after_clients_left"]


def test_a_few_clients_get_their_answers():
    with site(context=CONTEXT) as one:
        load = Load(clients=3, requests=8, bad=10, distinct=4)
        found = asyncio.run(measure(os.getpid(), one.url, load))
    healthy(found, 10)
    assert found["requests"] >= 8 and found["memory_mib"]["first"] > 10


def test_a_real_server_is_healthy_after_500_bad_requests():
    found = run(Load(clients=8, requests=60, bad=500, distinct=10))
    healthy(found, 500)
    assert found["clients_left"] > 0


def test_the_page_shows_the_table_of_the_committed_figures():
    docs = Path(__file__).parents[2] / "docs"
    before, after = serve_load._MARKS
    shown = (docs / "serving.md").read_text().split(before)[1].split(after)[0]
    assert shown == serve_load.table(json.loads((docs / "serve_load.json").read_text()))
