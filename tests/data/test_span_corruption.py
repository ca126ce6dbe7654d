import collections
import itertools
import math

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.data.span_corruption import SpanCorruption
from moe_jax.errors import ConfigError

T5 = SpanCorruption(vocab_size=32128)
SMALL = SpanCorruption(vocab_size=1000)
EOS, PAD = 1, 0


def bits(text):
    """A mask from "..##": # is noise."""
    return np.array([letter == "#" for letter in text], dtype=bool)


def corrupt(config, tokens, mask):
    inputs, targets = config.corrupt(np.array(tokens, dtype=np.int32), bits(mask))
    assert inputs.dtype == targets.dtype == np.int32
    return inputs.tolist(), targets.tolist()


def t5_unique_sentinels(tokens, noise, vocab_size):
    """T5's `noise_span_to_unique_sentinel`, token by token."""
    result, runs, before = [], 0, False
    for token, is_noise in zip(tokens, noise, strict=True):
        if is_noise and not before:
            runs += 1
            result.append(vocab_size - 1 + 1 - runs)
        elif not is_noise:
            result.append(token)
        before = is_noise
    return result


def t5_lengths(inputs_length, density, mean):
    """T5's `random_spans_helper` with one extra token per span on either side."""

    def both(length):
        noise = int(round(length * density))
        spans = int(round(noise / mean))
        return length - noise + spans + 1, noise + spans + 1

    length = inputs_length - 1
    while both(length + 1)[0] <= inputs_length:
        length += 1
    inputs, targets = both(length)
    if density == 0.5 and targets > inputs:
        length, targets = length - 1, targets - 1
    return length, targets


def runs_of(mask):
    """Lengths of the noise spans of a mask."""
    return [len(list(group)) for is_noise, group in itertools.groupby(mask) if is_noise]


# Published examples.


def test_figure_2_of_the_t5_paper():
    # Thank=2 you=3 for=4 inviting=5 me=6 to=7 your=8 party=9 last=10 week=11 .=12; X=19 Y=18 Z=17
    config = SpanCorruption(vocab_size=20, sentinels=3)
    tokens = [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    inputs, targets = corrupt(config, tokens, "..##....#..")
    assert inputs == [2, 3, 19, 6, 7, 8, 9, 18, 11, 12, EOS]  # Thank you X me to your party Y week.
    assert targets == [19, 4, 5, 18, 10, 17, EOS]  # X for inviting Y last Z


def test_example_of_the_huggingface_t5_documentation():
    # The=2 cute=3 dog=4 walks=5 in=6 the=7 park=8; <extra_id_0>=32099, as in t5-small's tokenizer.
    config = SpanCorruption(vocab_size=32100)
    inputs, targets = corrupt(config, [2, 3, 4, 5, 6, 7, 8], ".##..#.")
    assert inputs == [2, 32099, 5, 6, 32098, 8, EOS]
    assert targets == [32099, 3, 4, 32098, 7, 32097, EOS]


def test_example_of_t5s_own_tests_starts_with_noise():
    # preprocessors_test.py, test_noise_span_to_unique_sentinel: the inputs, there without EOS.
    inputs, targets = corrupt(SMALL, [10, 11, 12, 13, 14, 15], "##..#.")
    assert inputs == [999, 12, 13, 998, 15, EOS]
    # T5 counts non-noise spans here, so the first span has no sentinel and the second has the first
    # one, which the inputs gave to the first span.
    assert targets == [10, 11, 999, 14, 998, EOS]


@pytest.mark.parametrize(
    ("inputs_length", "density", "mean", "expected"),
    [
        (512, 0.15, 3.0, (568, 114)),  # Switch and T5: inputs of 512, targets of 114
        (64, 0.20, 2.0, (70, 22)),  # preprocessors_test.py, test_random_spans_helper
        (64, 0.20, 1.0, (63, 27)),
        (10, 0.15, 3.0, (10, 4)),  # axlearn's test of its port
        (10, 0.50, 3.0, (14, 10)),
    ],
)
def test_published_lengths(inputs_length, density, mean, expected):
    config = SpanCorruption(vocab_size=999, noise_density=density, mean_span_length=mean)
    assert config.lengths(inputs_length) == expected


def test_mask_of_t5s_own_tests_has_4_spans_of_8_tokens():
    config = SpanCorruption(vocab_size=999, noise_density=0.25, mean_span_length=2.0)
    for seed in range(20):
        spans = runs_of(config.random_spans_noise_mask(32, np.random.default_rng(seed)))
        assert (len(spans), sum(spans)) == (4, 8)


# Sentinels and layout.


def test_sentinels_descend_from_the_highest_id():
    np.testing.assert_array_equal(T5.sentinel_ids, np.arange(32127, 32027, -1))
    assert T5.sentinel_ids.dtype == np.int32
    np.testing.assert_array_equal(
        SpanCorruption(vocab_size=9, sentinels=3).sentinel_ids, np.array([8, 7, 6])
    )


def test_one_sentinel_per_span_whatever_its_length():
    inputs, targets = corrupt(SMALL, [10, 11, 12, 13, 14, 15, 16], ".####.#")
    assert inputs == [10, 999, 15, 998, EOS]
    # A text that ends with noise has no closing sentinel.
    assert targets == [999, 11, 12, 13, 14, 998, 16, EOS]


@pytest.mark.parametrize(
    ("mask", "inputs", "targets"),
    [("...", [5, 6, 7, EOS], [999, EOS]), ("###", [999, EOS], [5, 6, 7, EOS])],
)
def test_masks_of_one_kind(mask, inputs, targets):
    assert corrupt(SMALL, [5, 6, 7], mask) == (inputs, targets)


def test_no_tokens_leave_only_the_end():
    assert corrupt(SMALL, [], "") == ([EOS], [EOS])


def test_the_text_is_left_alone():
    tokens = np.arange(10, 16, dtype=np.int32)
    SMALL.corrupt(tokens, bits(".##.#."))
    np.testing.assert_array_equal(tokens, np.arange(10, 16))


# Comparisons with T5's functions, and the inverse.

texts_and_masks = st.integers(0, 60).flatmap(
    lambda length: st.tuples(
        st.lists(st.integers(0, 899), min_size=length, max_size=length),
        st.lists(st.booleans(), min_size=length, max_size=length),
    )
)


@given(texts_and_masks)
def test_any_mask_gives_what_t5s_functions_give(text_and_mask):
    tokens, mask = text_and_mask
    inputs, targets = SMALL.corrupt(np.array(tokens, np.int32), np.array(mask, bool))
    assert inputs.tolist() == t5_unique_sentinels(tokens, mask, 1000) + [EOS]
    assert targets.tolist() == t5_unique_sentinels(tokens, [not m for m in mask], 1000) + [EOS]


@given(texts_and_masks)
def test_pieces_between_the_sentinels_rebuild_the_text(text_and_mask):
    tokens, mask = [7, *text_and_mask[0]], [False, *text_and_mask[1]]
    inputs, targets = (
        a.tolist() for a in SMALL.corrupt(np.array(tokens, np.int32), np.array(mask))
    )
    kept, removed = {}, {}
    for pieces, sequence in ((kept, inputs), (removed, targets)):
        sentinel = None
        assert sequence[-1] == EOS
        for token in sequence[:-1]:
            if token >= 900:
                sentinel = token
            pieces.setdefault(sentinel, []).extend([token] if token < 900 else [])
    # The text before the first sentinel, then for each sentinel its span and what follows it.
    rebuilt = kept.pop(None)
    for sentinel in removed:
        rebuilt += removed[sentinel] + kept.pop(sentinel, [])
    assert rebuilt == tokens and not kept
    assert list(removed) == list(range(999, 999 - len(removed), -1))


@pytest.mark.parametrize("density, mean", [(0.15, 3.0), (0.5, 3.0), (0.5, 2.5), (0.3, 1.0)])
def test_lengths_are_t5s(density, mean):
    config = SpanCorruption(
        vocab_size=9999, noise_density=density, mean_span_length=mean, sentinels=900
    )
    for inputs_length in range(10, 1200):
        assert config.lengths(inputs_length) == t5_lengths(inputs_length, density, mean)


@pytest.mark.parametrize("density, mean", [(0.15, 3.0), (0.5, 3.0), (0.3, 1.0), (0.6, 4.0)])
def test_lengths_are_the_largest_that_fit_the_drawn_masks(density, mean):
    config = SpanCorruption(vocab_size=999, noise_density=density, mean_span_length=mean)
    rng = np.random.default_rng(0)

    # How long inputs and targets are follows from the text's length, so one draw of each will do.
    drawn = {}
    for length in range(2, 180):
        corrupted = config.corrupt(np.full(length, 5), config.random_spans_noise_mask(length, rng))
        drawn[length] = tuple(map(len, corrupted))
    for inputs_length in range(3, 60):
        tokens_length, targets_length = config.lengths(inputs_length)
        longest = max(length for length, (inputs, _) in drawn.items() if inputs <= inputs_length)
        assert longest < 179
        # At density 0.5 T5 gives up one token where the targets would be the longer ones.
        given_up = density == 0.5 and drawn[longest][1] > inputs_length
        assert tokens_length == longest - given_up
        assert max(drawn[n][1] for n in range(2, tokens_length + 1)) <= targets_length


def test_short_inputs_fit_where_t5s_estimate_has_no_span():
    # T5 counts no span for one noise token in 6, so its 6 tokens become 5 + sentinel + EOS = 7.
    assert t5_lengths(6, 0.15, 3.0)[0] == 6
    assert T5.lengths(6) == (5, 3)


def test_masks_round_as_lengths_do_and_not_in_float32():
    # 190 x 0.15 is 28.5 in float64, and 28.500002 in float32, where T5's mask has 29 noise tokens.
    assert np.round(np.float32(190) * np.float32(0.15)) == 29
    assert T5.random_spans_noise_mask(190, np.random.default_rng(0)).sum() == 28


# Statistics of the mask.


def test_density_and_mean_span_of_long_texts():
    rng = np.random.default_rng(0)
    for length in (100, 512, 568, 2000):
        spans = runs_of(SpanCorruption(vocab_size=999).random_spans_noise_mask(length, rng))
        # Both numbers are rounded: half a token of noise, and half a span of about 3 tokens.
        assert abs(sum(spans) - 0.15 * length) <= 0.5
        assert abs(len(spans) - sum(spans) / 3) <= 0.5
    spans = runs_of(T5.random_spans_noise_mask(568, rng))
    assert (sum(spans), len(spans)) == (85, 28)


@given(st.integers(2, 300), st.floats(0.01, 0.6), st.floats(1.5, 10), st.integers(0, 2**32 - 1))
def test_mask_has_the_stated_noise_and_spans(length, density, mean, seed):
    config = SpanCorruption(
        vocab_size=999, noise_density=density, mean_span_length=mean, sentinels=300
    )
    noise = min(max(round(length * density), 1), length - 1)
    spans = max(round(noise / mean), 1)
    if spans > length - noise:
        with pytest.raises(ConfigError, match="cannot be kept apart"):
            config.random_spans_noise_mask(length, np.random.default_rng(seed))
        return
    mask = config.random_spans_noise_mask(length, np.random.default_rng(seed))
    assert mask.dtype == bool and mask.shape == (length,)
    assert (sum(runs_of(mask)), len(runs_of(mask))) == (noise, spans)
    assert not mask[0] and mask[-1]


def test_all_masks_are_equally_likely():
    config = SpanCorruption(vocab_size=999, noise_density=0.4, mean_span_length=2.0)
    rng = np.random.default_rng(0)
    # 4 noise and 6 other tokens in 2 spans each: 3 x 5 masks.
    draws = collections.Counter(
        config.random_spans_noise_mask(10, rng).tobytes() for _ in range(3_000)
    )
    assert len(draws) == math.comb(3, 1) * math.comb(5, 1)
    chi_square = sum((count - 200) ** 2 / 200 for count in draws.values())
    assert chi_square < 36.1  # p = 0.001 with 14 degrees of freedom


def test_one_token_at_least_is_noise_and_one_is_kept():
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(T5.random_spans_noise_mask(3, rng), bits("..#"))
    dense = SpanCorruption(vocab_size=999, noise_density=0.99, mean_span_length=50.0)
    np.testing.assert_array_equal(dense.random_spans_noise_mask(10, rng), bits(".#########"))


def test_masks_depend_on_the_generator_only():
    one, again, other = (
        T5.random_spans_noise_mask(568, np.random.default_rng(seed)) for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


# Examples of fixed shapes.


def test_example_of_a_short_text_by_hand():
    # Length 2 has one mask; 10 inputs hold 10 tokens, whose targets are 4.
    example = T5.example(np.array([50, 60]), np.random.default_rng(0), inputs_length=10)
    expected = {
        "inputs": [50, 32127, EOS, PAD, PAD, PAD, PAD, PAD, PAD, PAD],
        "targets": [32127, 60, EOS, PAD],
        "decoder_inputs": [PAD, 32127, 60, EOS],
        "inputs_segments": [1, 1, 1, 0, 0, 0, 0, 0, 0, 0],
        "targets_segments": [1, 1, 1, 0],
        "targets_places": [0, 1, 1, 1],
    }
    assert {name: array.tolist() for name, array in example.items()} == expected
    assert all(array.dtype == np.int32 for array in example.values())


def test_other_special_ids_are_used():
    config = SpanCorruption(vocab_size=359, eos_id=2, pad_id=3)
    example = config.example(np.array([50, 60]), np.random.default_rng(0), inputs_length=10)
    assert example["targets"].tolist() == [358, 60, 2, 3]
    assert example["decoder_inputs"].tolist() == [3, 358, 60, 2]
    assert example["inputs"].tolist() == [50, 358, 2] + 7 * [3]
    assert example["inputs_segments"].tolist() == 3 * [1] + 7 * [0]


def test_a_full_text_has_no_padding():
    tokens = np.random.default_rng(0).integers(2, 32000, 568)
    example = T5.example(tokens, np.random.default_rng(1))
    assert {name: len(array) for name, array in example.items()} == {
        "inputs": 512,
        "targets": 114,
        "decoder_inputs": 114,
        "inputs_segments": 512,
        "targets_segments": 114,
        "targets_places": 114,
    }
    assert example["inputs_segments"].all() and example["targets_segments"].all()
    assert example["inputs"][-1] == example["targets"][-1] == EOS


@settings(max_examples=50)
@given(st.integers(2, 70), st.integers(0, 2**32 - 1))
def test_example_is_the_corrupted_text_and_padding(length, seed):
    tokens = np.arange(200, 200 + length)
    config = SpanCorruption(vocab_size=1000, noise_density=0.2, mean_span_length=2.0)
    example = config.example(tokens, np.random.default_rng(seed), inputs_length=64)
    mask = config.random_spans_noise_mask(length, np.random.default_rng(seed))
    inputs, targets = config.corrupt(tokens, mask)
    for name, real, size in (("inputs", inputs, 64), ("targets", targets, 22)):
        np.testing.assert_array_equal(example[name][: len(real)], real)
        assert example[name].shape == (size,) and not example[name][len(real) :].any()
        np.testing.assert_array_equal(example[f"{name}_segments"], np.arange(size) < len(real))
    np.testing.assert_array_equal(example["decoder_inputs"][1:], example["targets"][:-1])
    assert example["decoder_inputs"][0] == PAD


def test_grain_batches_are_reproducible():
    texts = [np.arange(10, 10 + length, dtype=np.int32) for length in (2, 30, 63, 70)]
    config = SpanCorruption(vocab_size=1000, noise_density=0.2, mean_span_length=2.0)

    def batch(seed):
        dataset = grain.MapDataset.source(texts).seed(seed)
        dataset = dataset.random_map(lambda text, rng: config.example(text, rng, inputs_length=64))
        return dataset.batch(4)[0]

    assert batch(0)["inputs"].shape == (4, 64) and batch(0)["targets"].shape == (4, 22)
    np.testing.assert_array_equal(batch(0)["inputs"], batch(0)["inputs"])
    assert (batch(0)["inputs"] != batch(1)["inputs"]).any()


# Refusals.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"noise_density": 0.0}, "noise_density=0.0 must be above 0 and below 1"),
        ({"noise_density": 1.0}, "noise_density=1.0 must be above 0 and below 1"),
        ({"noise_density": math.nan}, "noise_density=nan"),
        ({"mean_span_length": 0.5}, "mean_span_length=0.5 must be at least 1"),
        ({"mean_span_length": math.inf}, "mean_span_length=inf"),
        ({"sentinels": 0}, "sentinels=0 must be at least 1"),
        ({"eos_id": 0}, "pad_id and eos_id are both 0"),
        ({"eos_id": 950}, "eos_id=950 must be at least 0 and below the sentinels"),
        ({"pad_id": -1}, "pad_id=-1 must be at least 0"),
        ({"vocab_size": 100}, "eos_id=1 .* vocab_size=100"),
    ],
)
def test_fields_out_of_range_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message) as error:
        SpanCorruption(**{"vocab_size": 1000, **fields})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", [0, 1])
def test_texts_too_short_are_refused(length):
    rng = np.random.default_rng(0)
    with pytest.raises(ConfigError, match=rf"a text of {length} token\(s\) is too short"):
        T5.random_spans_noise_mask(length, rng)
    with pytest.raises(ConfigError, match="too short"):
        T5.example(np.full(length, 5), rng)
    with pytest.raises(ConfigError, match="inputs_length=2 must be at least 3"):
        T5.lengths(2)


def test_texts_too_long_are_refused():
    with pytest.raises(ConfigError, match="569 tokens is too long: inputs_length=512 holds 568"):
        T5.example(np.full(569, 5), np.random.default_rng(0))


def test_more_spans_than_sentinels_are_refused():
    config = SpanCorruption(vocab_size=1000, sentinels=27)
    message = "28 spans need as many sentinels, but sentinels=27"
    with pytest.raises(ConfigError, match=message):
        config.lengths()
    with pytest.raises(ConfigError, match=message):
        config.random_spans_noise_mask(568, np.random.default_rng(0))
    assert SpanCorruption(vocab_size=1000, sentinels=28).lengths() == (568, 114)


def test_the_closing_sentinel_of_the_targets_counts():
    config = SpanCorruption(vocab_size=1000, sentinels=2)
    corrupt(config, [5, 6, 7, 8], ".#.#")
    with pytest.raises(ConfigError, match="3 spans need as many sentinels"):
        corrupt(config, [5, 6, 7, 8, 9], ".#.#.")


@pytest.mark.parametrize(
    ("density", "mean", "message"),
    [(0.9, 1.0, "9 noise spans .* by the 1 other"), (0.75, 3.0, "3 noise spans .* by the 2 other")],
)
def test_spans_that_must_touch_are_refused(density, mean, message):
    config = SpanCorruption(vocab_size=1000, noise_density=density, mean_span_length=mean)
    with pytest.raises(ConfigError, match=message):
        config.random_spans_noise_mask(10, np.random.default_rng(0))


@pytest.mark.parametrize("token", [-1, 900, 999, 1000])
def test_ids_outside_the_text_vocabulary_are_refused(token):
    with pytest.raises(ConfigError, match=rf"has the id {token}, but its ids must be 0 to 899"):
        corrupt(SMALL, [5, token], ".#")


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        (np.zeros((2, 2), int), np.zeros((2, 2), bool), "tokens must be a vector of integers"),
        (np.zeros(2), np.zeros(2, bool), "tokens must be a vector of integers, got float64"),
        (np.zeros(2, int), np.zeros(3, bool), "the mask must be bool of the tokens' shape"),
        (np.zeros(2, int), np.zeros(2, int), "the mask must be bool .* got int64"),
    ],
)
def test_wrong_arrays_are_refused(tokens, mask, message):
    with pytest.raises(ConfigError, match=message):
        SMALL.corrupt(tokens, mask)
