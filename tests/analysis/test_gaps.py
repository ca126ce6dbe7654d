"""Intervals of gaps on groups that are equal or differ by a known amount."""

import numpy as np
import pytest
from scipy import stats

from moe_jax.analysis.gaps import FEWEST, gap_of_ratio, in_words


def draw(generator, groups, size, shift=0.0):
    """Documents of unequal lengths; each bit per byte of the last group is larger by a share."""
    labels = np.repeat(np.arange(groups), size)
    lengths = np.round(np.exp(generator.normal(6, 0.5, len(labels))))
    bits = lengths * np.exp(generator.normal(0.6, 0.25, len(labels)))
    return bits * (1 + shift * (labels == groups - 1)), lengths, labels


def gap(over, under, labels):
    names = [f"g{group}" for group in range(labels.max() + 1)]
    return gap_of_ratio(over, under, labels, names, "bits_per_byte")


@pytest.mark.parametrize("groups", [2, 8])
def test_equal_groups_have_a_gap_in_five_of_a_hundred_draws(groups):
    generator = np.random.default_rng(groups)
    lows = [gap(*draw(generator, groups, 8))["interval"][0] for _ in range(2000)]
    assert np.mean(np.array(lows) > 0) <= 0.07


def test_a_planted_gap_is_found():
    generator = np.random.default_rng(0)
    found = [gap(*draw(generator, 8, 8, 1.0)) for _ in range(20)]
    assert all(one["worst"] == "g7" and one["interval"][0] > 0 for one in found)
    assert all(one["uneven"] for one in found)
    drops, unrouted = {**found[0], "dropped": 0.0}, {**found[0], "unrouted": 0.0}
    (line, *_) = in_words({**found[0], "drops": drops, "unrouted": unrouted})
    assert line.endswith(": the service is uneven")


def test_two_groups_of_equal_lengths_have_the_interval_of_welch():
    # With one length the ratio is a mean, whose jackknife is the ordinary error; with two groups
    # the studentized range is Student's t. Welch has 4 degrees of freedom here.
    first, second = np.array([1.0, 2, 3, 4, 5]), np.array([11.0, 11, 11, 11, 11])
    over, labels = np.concatenate([first, second]), np.repeat([0, 1], 5)
    found = gap(over, np.ones(10), labels)
    assert (found["worst"], found["best"], found["bits_per_byte"]) == ("g1", "g0", 8)
    width = stats.t.ppf(0.975, 4) * stats.sem(first)
    assert found["interval"] == pytest.approx([8 - width, 8 + width], rel=1e-4)


def test_a_ratio_leaves_out_one_document_at_a_time():
    # Documents of 1, 1, 1, 1 and 6 bytes with 1, 1, 1, 1 and 12 bits: without one of the first the
    # ratio is 15/9, without the last it is 1. The other group has no variance.
    over, under = np.array([1.0, 1, 1, 1, 12, 9, 9, 9, 9, 9]), np.array([1.0, 1, 1, 1, 6] + 5 * [1])
    found = gap(over, under, np.repeat([0, 1], 5))
    left = np.array(4 * [15 / 9] + [1.0])
    width = stats.t.ppf(0.975, 4) * np.sqrt(4 / 5 * np.square(left - left.mean()).sum())
    assert found["bits_per_byte"] == pytest.approx(9 - 1.6)
    assert found["interval"] == pytest.approx([7.4 - width, 7.4 + width], rel=1e-4)


@pytest.mark.parametrize("size", [1, FEWEST - 1])
def test_few_documents_have_no_interval(size):
    found = gap(*draw(np.random.default_rng(0), 2, size))
    assert found["uneven"] is None
    assert found["interval"] is None and found["bits_per_byte"] > 0 and found["fewest"] == size
    drops, unrouted = {**found, "dropped": 0.0}, {**found, "unrouted": 0.0}
    (line, *_) = in_words({**found, "drops": drops, "unrouted": unrouted})
    assert line.endswith(f"no interval: a group has {size} documents, fewer than 5")


def test_groups_without_variance_have_an_interval_without_width():
    found = gap(np.zeros(10), np.ones(10), np.repeat([0, 1], 5))
    assert (found["worst"], found["best"], found["interval"]) == ("g1", "g0", [0, 0])
