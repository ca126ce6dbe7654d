"""Decoding with a cache equals decoding without, row by row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import decoding, routing
from moe_jax.decoding import (
    Rules,
    Sampling,
    choose,
    choose_by_row,
    generate,
    padded,
    positions_of,
    translate,
)
from moe_jax.errors import ConfigError
from moe_jax.models import (
    AttentionOverride,
    Decoder,
    DecoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
)
from moe_jax.nn.attention import Details
from moe_jax.nn.attention_experts import AttentionExpertsConfig
from moe_jax.nn.latent import Latent
from moe_jax.nn.mode import DECODE
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.positions import Learned, NoPositions, Sinusoidal, T5Relative

VOCAB = 23
# A router that would drop most tokens, were they not decoded with a slot for each.
TIGHT = routing.preset("switch", capacity_factor=0.25, eval_capacity_factor=0.25)
MOE = MoEConfig(every=2, num_experts=4, expert_dim=12, group_size=8, router=TIGHT)
SMALL = DecoderConfig(
    num_layers=4, width=16, num_heads=4, num_kv_heads=2, head_dim=6, mlp_dim=20, moe=MOE
)
LOCAL = Details(window=3, sinks=True, qkv_bias=True)
VARIANTS = {
    "rotary": SMALL,
    "unrolled, bias": dataclasses.replace(SMALL, scan_layers=False, mlp_bias=True),
    "t5": dataclasses.replace(SMALL, positions=T5Relative(8, 12)),
    "learned": dataclasses.replace(SMALL, positions=Learned(40)),
    "sinusoidal": dataclasses.replace(SMALL, positions=Sinusoidal()),
    "none": dataclasses.replace(SMALL, positions=NoPositions()),
    "windows": dataclasses.replace(
        SMALL, attention=LOCAL, attention_overrides=(AttentionOverride(every=2),)
    ),
    "chunks": dataclasses.replace(SMALL, attention=Details(chunk=4, qk_norm="unit")),
    "experts in attention": dataclasses.replace(
        SMALL,
        attention=Details(qkv_bias=True),
        attention_experts=AttentionExpertsConfig(2, num_experts=3, group_size=8, router=TIGHT),
    ),
    "latent": dataclasses.replace(
        SMALL, attention=Latent(query_rank=8, kv_rank=6, plain_dim=4, rotary_dim=4, value_dim=5)
    ),
}
PROMPTS = [[3, 1, 4, 1, 5, 9], [2, 7], [1, 8, 2, 8]]
GREEDY = Sampling(tokens=9, temperature=0.0)


def uncached(model, prompt, tokens):
    """One row alone, each token from a pass over all before it, at one length."""
    length = len(prompt) + tokens

    @jax.jit
    def logits(model, inputs, segments):
        place = jnp.arange(length)[None]
        return model.logits(model.hidden(inputs, segments, place, mode=DECODE)[0])

    row = list(prompt)
    for _ in range(tokens):
        inputs, segments = np.zeros((2, 1, length), np.int32)
        inputs[0, : len(row)], segments[0, : len(row)] = row, 1
        row.append(int(logits(model, inputs, segments)[0, len(row) - 1].argmax()))
    return row[len(prompt) :]


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_with_a_cache_equals_each_row_alone_without(name):
    model = Decoder(VARIANTS[name], VOCAB, jax.random.key(1))
    found = generate(model, PROMPTS, GREEDY)
    assert found == [uncached(model, prompt, GREEDY.tokens) for prompt in PROMPTS]
    assert len({tuple(row) for row in found}) == 3


def test_logits_piece_by_piece_equal_those_at_once():
    model = Decoder(VARIANTS["latent"], VOCAB, jax.random.key(0))
    tokens, segments = padded([[3, 1, 4, 1, 5, 9, 2, 6]], in_front=True)
    place = positions_of(jnp.asarray(segments))
    whole, _ = model.hidden(jnp.asarray(tokens), jnp.asarray(segments), place, mode=DECODE)
    cache, parts = model.empty_cache(1, 8), []
    for start, stop in ((0, 3), (3, 4), (4, 8)):
        piece = slice(start, stop)
        hidden, cache = model.extend(
            jnp.asarray(tokens[:, piece]), jnp.asarray(segments[:, piece]), place[:, piece], cache
        )
        parts.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=2e-5)
    # What is kept of a token is its latent: 6 and 4 numbers, not 4 heads of 8 and 5.
    kept = cache.layers[0][0]["self"]
    assert kept["latent"].shape[1:] == (1, 1, 8, 6) and kept["rotated"].shape[-1] == 4


def test_an_encoder_decoder_with_a_cache_equals_one_without():
    config = EncoderDecoderConfig(
        encoder_layers=2,
        decoder_layers=2,
        width=16,
        num_heads=4,
        head_dim=6,
        mlp_dim=20,
        encoder_moe=MOE,
        decoder_moe=MOE,
    )
    model = EncoderDecoder(config, VOCAB, jax.random.key(1))
    found = translate(model, PROMPTS, GREEDY, start_id=0)
    for prompt, row in zip(PROMPTS, found, strict=True):
        source, one = jnp.asarray([prompt]), jnp.ones((1, len(prompt)), jnp.int32)
        memory, _ = model.encode(source, one, mode=DECODE)
        target = jnp.asarray([[0, *row[:-1]]])
        hidden, _ = model.decode(target, jnp.ones_like(target), memory, one, mode=DECODE)
        np.testing.assert_array_equal(model.logits(hidden)[0].argmax(-1), row)


def test_a_row_ends_at_its_first_end_token():
    model = Decoder(SMALL, VOCAB, jax.random.key(1))
    rows = generate(model, PROMPTS, GREEDY)
    ends = (rows[0][3], rows[1][2])
    found = generate(model, PROMPTS, dataclasses.replace(GREEDY, eos_id=ends))
    for row, whole in zip(found, rows, strict=True):
        places = [place for place, token in enumerate(whole) if token in ends]
        assert row == whole[: places[0] + 1 if places else None]
    assert found[0][-1] in ends and len(found[0]) <= 4
    assert found[1][-1] in ends and len(found[1]) <= 3


def test_one_end_token_several_and_none_are_settings():
    assert Sampling().eos_ids == Sampling(eos_id=()).eos_ids == ()
    assert Sampling(eos_id=7).eos_ids == (7,)
    several = Sampling(eos_id=[7, 2])
    assert several.eos_ids == (7, 2) and several == Sampling(eos_id=(7, 2))
    assert hash(several) == hash(Sampling(eos_id=(7, 2)))
    with pytest.raises(ConfigError, match=r"Sampling.eos_id\[1\]=-2 must be at least 0"):
        Sampling(eos_id=(7, -2))


def shares(sampling, logits):
    keys = jax.random.split(jax.random.key(0), 2000)
    found = jax.vmap(lambda key: choose(logits[None], sampling, key)[0])(keys)
    return np.bincount(np.asarray(found), minlength=logits.size) / keys.size


def test_sampling_by_hand():
    # Probabilities 0.5, 0.25, 0.15, 0.1; five binomial deviations of 2000 draws are below 0.06.
    logits = jnp.log(jnp.array([0.25, 0.5, 0.1, 0.15]))
    np.testing.assert_allclose(
        shares(Sampling(temperature=1.0), logits), [0.25, 0.5, 0.1, 0.15], atol=0.06
    )
    top2 = shares(Sampling(temperature=1.0, top_k=2), logits)
    np.testing.assert_allclose(top2, [1 / 3, 2 / 3, 0, 0], atol=0.06)
    # 0.5 + 0.25 < 0.8, so the third is the last that is needed.
    top_p = shares(Sampling(temperature=1.0, top_p=0.8), logits)
    np.testing.assert_allclose(top_p, np.array([0.25, 0.5, 0, 0.15]) / 0.9, atol=0.06)
    assert shares(Sampling(temperature=1.0, top_p=0.5), logits)[1] == 1.0
    # Of tokens that are equally likely the first are kept, and no more than asked for.
    ties = jnp.log(jnp.array([0.2, 0.4, 0.4]))
    for few in (Sampling(temperature=1.0, top_k=1), Sampling(temperature=1.0, top_p=0.3)):
        assert shares(few, ties)[1] == 1.0
    # Temperature 0.5 squares the odds.
    cold = shares(Sampling(temperature=0.5, top_k=2), logits)
    np.testing.assert_allclose(cold, [0.2, 0.8, 0, 0], atol=0.06)
    assert shares(Sampling(temperature=0.0), logits)[1] == 1.0


def test_rows_with_their_own_rules_are_sampled_as_each_alone():
    ways = [
        Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        for temperature in (0.0, 0.6, 2.0)
        for top_k in (0, 3)
        for top_p in (0.7, 1.0)
    ]
    logits = jax.random.normal(jax.random.key(0), (len(ways), 31)) * 3
    rules = Rules(
        *(jnp.array([getattr(way, n) for way in ways]) for n in ("temperature", "top_k", "top_p"))
    )
    rows = jax.jit(choose_by_row)
    for seed in range(20):
        keys = jax.random.split(jax.random.key(seed), len(ways))
        expected = [choose(logits[i : i + 1], way, keys[i])[0] for i, way in enumerate(ways)]
        np.testing.assert_array_equal(rows(logits, rules, keys), expected)


def test_samples_repeat_by_seed():
    model = Decoder(SMALL, VOCAB, jax.random.key(1))
    draw = [generate(model, PROMPTS, Sampling(8, 1.0, seed=seed)) for seed in (0, 0, 1)]
    assert draw[0] == draw[1] != draw[2]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"tokens": 0}, "tokens=0 must be at least 1"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"temperature": -1.0}, "temperature=-1.0"),
    ],
)
def test_bad_settings_are_refused(settings, match):
    with pytest.raises(ConfigError, match=match):
        Sampling(**settings)


def test_bad_prompts_are_refused():
    model = Decoder(VARIANTS["learned"], VOCAB, jax.random.key(0))
    for prompts in ([], [[1], []]):
        with pytest.raises(ConfigError, match="at least one token"):
            generate(model, prompts, GREEDY)
    with pytest.raises(ConfigError, match="41 tokens, and the model has learned 40 positions"):
        generate(model, PROMPTS, Sampling(tokens=35))
    assert decoding.padded([[1, 2], [3]], in_front=True)[1].tolist() == [[1, 1], [0, 1]]


@pytest.mark.parametrize("tokens", [300, 512])
def test_the_first_of_the_most_likely_tokens_is_chosen(tokens):
    # 512 tokens are four blocks of 128; equal logits are in one block and in two.
    logits = np.zeros((4, tokens), np.float32)
    logits[0, [5, 9]] = 1.0
    logits[1, [130, 258]] = 1.0
    logits[2, -1] = 1.0
    logits[3] = -np.inf
    found = decoding._most_likely(jnp.asarray(logits))
    assert found.tolist() == [5, 130, tokens - 1, 0]
    assert found.dtype == jnp.int32
