"""Prompts that share a chunk, each in pieces of its own."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from moe_jax.decoding import Sampling, generate
from moe_jax.models import Decoder
from moe_jax.serving import Engine, LookaheadModule, NGram, Offload, Request, Speculation, engine
from moe_jax.serving.program import StepShape
from moe_jax.serving.running import inputs_of, parts_of, shape_for
from tests.serving.test_engine import CONFIGS, SIZES, answers, greedy_equal, made, same_in_any_mix
from tests.test_decoding import VOCAB

MANY = {"slots": 8, "prefill": 8}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Lets a chunk of 8 tokens have 4 pieces."""
    monkeypatch.setattr(engine, "_SHORTEST_PIECE", 2)


@pytest.fixture(scope="module")
def windows():
    """A model with windows and an engine for it, which all tests leave idle."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_SHORTEST_PIECE", 2)
        return made("windows", **MANY)


def reading(number, unread, computed=0):
    """A request of which ``unread`` tokens have no entries."""
    tokens = list(range(100 * number, 100 * number + computed + unread))
    held = SimpleNamespace(computed=computed, pages=[10 * number + i for i in range(8)])
    sampling = Sampling(4, temperature=0.0)
    request = SimpleNamespace(prompt=tuple(tokens), sampling=sampling, logprobs=0)
    return SimpleNamespace(
        number=number,
        request=request,
        held=held,
        tokens=tokens,
        unread=tokens[computed:],
        sampled=0,
    )


def test_prompts_fill_pieces_in_the_order_of_their_numbers():
    # Four pieces of 2 tokens: request 1 needs two of them, request 2 reads one token in its slot,
    # request 3 gets the other two for 4 of its 9 tokens, and request 4 reads nothing.
    slots = [reading(3, 9), None, reading(1, 3), reading(4, 5), reading(2, 1)]
    parts = parts_of(slots, 8, 4)
    assert [(p.request.number, p.number, p.piece, p.row) for p in parts] == [
        (3, 4, 2, 0),
        (1, 3, 0, 1),
        (2, 1, 0, 2),
    ]
    # A chunk in one piece is of the first request alone.
    parts = parts_of(slots, 8)
    assert [(p.request.number, p.number) for p in parts] == [(1, 3), (2, 1)]


def test_a_step_has_the_smallest_chunk_that_holds_its_prompts():
    shapes = [StepShape(8, *size, page=4, pieces=p) for size, p in (((8, 8), 1), ((8, 8), 4))]
    shapes += [StepShape(8, 2, 8, 4), StepShape(8, 0, 8, 4)]

    def chosen(*unread):
        found = shape_for(shapes, parts_of([reading(n, u) for n, u in enumerate(unread)], 8, 4))
        return found.chunk, found.pieces

    assert chosen(1, 1) == (0, 1)
    assert chosen(2, 1) == (2, 1)  # one piece alone
    assert chosen(3) == (8, 1) and chosen(20) == (8, 1)  # one prompt has one table
    assert chosen(3, 2) == (8, 4)


def test_a_lone_prompt_takes_the_step_with_the_fewest_tokens():
    # With 8 rows and a chunk of 2 a step has 10 tokens, with 1 row and a chunk of 16 it has 17, and
    # with 8 rows and this chunk 24.
    shapes = [StepShape(8, 16, 8, 4), StepShape(1, 16, 8, 4), StepShape(8, 2, 8, 4)]

    def chosen(*unread):
        found = shape_for(shapes, parts_of([reading(n, u) for n, u in enumerate(unread)], 16, 4))
        return found.slots, found.chunk

    assert chosen(2) == (8, 2)
    assert chosen(3) == (1, 16)
    assert chosen(3, 1) == (8, 16)


def test_the_table_of_a_lone_chunk_has_room_for_its_tokens():
    # Tables of 128 and 512 tokens are 8 and 32 pages of 16. A chunk of 256 tokens of one request
    # fills 16 pages; its pieces may be of several requests, each with a table.
    sizes = [(8, 256, 1), (8, 256, 8), (8, 0, 1)]
    shapes = engine._shapes(sizes, page=16, pages=32, drafts=0)
    tables = {
        size: [x.pages for x in shapes if (x.slots, x.chunk, x.pieces) == size] for size in sizes
    }
    assert tables == {(8, 256, 1): [32, 16], (8, 256, 8): [32, 8], (8, 0, 1): [32, 8]}
    # No table is wider than a request, and no shape comes twice.
    assert [x.pages for x in engine._shapes(sizes[:1], page=16, pages=10, drafts=0)] == [10]


def test_a_piece_has_the_table_of_its_request():
    shape = StepShape(slots=3, chunk=8, pages=3, page=4, pieces=4)
    inputs = inputs_of(parts_of([reading(1, 3), reading(2, 1, 5), reading(3, 3, 4)], 8, 4), shape)
    # Rows of slots are the first three tokens; request 1 has pieces 0 and 1, request 3 the others.
    assert inputs.valid.tolist() == [0, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0]
    assert inputs.tables[1].tolist() == [[10, 11, 12]] * 2 + [[30, 31, 32]] * 2
    assert inputs.tables[0][1].tolist() == [20, 21, 22]
    # Entry = page x 4 + place; the tokens of request 3 are in its second page.
    assert inputs.entries[3:6].tolist() == [40, 41, 42]
    assert inputs.entries[7:10].tolist() == [124, 125, 126]
    assert inputs.positions[7:11].tolist() == [4, 5, 6, 7]  # That of padding goes on.
    assert inputs.ends[:, 0].tolist() == [5, 1, 9]


def test_several_prompts_are_read_in_one_step(windows):
    _, many = windows
    sizes = {(each.chunk, each.pieces) for each in many._programs}
    assert sizes == {(8, 1), (8, 4), (2, 1), (0, 1)}
    requests = [Request(tuple(range(n, n + 2)), Sampling(2, 0.0)) for n in range(1, 10, 2)]
    for request in requests:
        many.submit(request)
    # Four prompts of 2 tokens fill the pieces of the first step; the fifth comes beside them.
    assert [len(many.step()) for _ in range(3)] == [4, 5, 1]


def test_a_prompt_that_begins_as_another_one_waits_for_its_entries(windows):
    _, many = windows
    before = many.prefill.shared
    prompt = (1, 2, 3, 4, 5)
    for last in (6, 7):
        many.submit(Request((*prompt, last), Sampling(1, 0.0)))
    many.submit(Request((9, 8, 7), Sampling(1, 0.0)))
    assert [len(many.step()) for _ in range(2)] == [1, 2]
    assert many.prefill.shared == before + 4  # the first page of the second request


def test_tokens_are_those_of_generate_in_any_mix(windows):
    greedy_equal(*windows)
    same_in_any_mix(windows[1], 12, 5)


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_those_of_generate_in_any_mix_in_every_model(name):
    model, many = made(name, **MANY)
    greedy_equal(model, many)
    same_in_any_mix(many, 8, 2)


@pytest.mark.parametrize(
    "more",
    [
        {"speculation": Speculation(NGram(), 2)},
        {"speculation": Speculation(LookaheadModule())},
        {"offload": Offload(20_000)},
    ],
    ids=["n-gram", "lookahead", "offload"],
)
def test_drafts_and_budgets_change_no_token(more):
    config = dataclasses.replace(CONFIGS["rotary"], lookahead=1)
    model = Decoder(config, VOCAB, jax.random.key(1))
    many = Engine(model, **(SIZES | MANY), **more)
    rng = np.random.default_rng(4)
    prompts = [rng.integers(0, VOCAB, size).tolist() for size in (2, 9, 5, 3, 12, 1, 2, 7, 4)]
    greedy = Sampling(tokens=8, temperature=0.0)
    found = answers(many, [Request(tuple(prompt), greedy) for prompt in prompts])
    assert found == generate(model, prompts, greedy)
