"""Statistics of hand-sized choices whose values are known."""

import dataclasses
import math

import numpy as np
import pytest
from scipy.stats import entropy

from moe_jax.analysis import atlas
from moe_jax.analysis.observed import Observed, ObservedLayer


def layer(choices, experts=4, gates=None):
    choices = np.array(choices)
    return ObservedLayer(
        "layer 0", experts, choices, np.ones(choices.shape) if gates is None else gates
    )


def observed(layers, tokens, documents, losses=None):
    number = len(tokens)
    losses = np.zeros(number) if losses is None else np.array(losses)
    positions = np.concatenate([np.arange(n) for n in np.bincount(documents)])
    return Observed(np.array(tokens), positions, np.array(documents), losses, tuple(layers))


def test_load_counts_choices_before_capacity():
    # Expert 0 is chosen by four tokens and drops the last; expert 1 by one, expert 3 by one;
    # the choice of index 4 is a free expert, which is no choice of an expert and not dropped.
    found = atlas.load_of(layer([[0], [0], [0], [-1], [1], [3], [-5]]))
    np.testing.assert_allclose(found["load"], [4 / 6, 1 / 6, 0, 1 / 6])
    assert found["dead"] == [2] and found["hot"] == [0]
    assert found["dropped"] == pytest.approx(1 / 6)
    entropy = -(4 / 6 * math.log(4 / 6) + 2 / 6 * math.log(1 / 6)) / math.log(4)
    assert found["entropy"] == pytest.approx(entropy)


def test_choices_that_a_token_does_not_make_are_no_load_and_no_drop():
    # Two experts and no free one; every second choice is not made, and one choice is dropped.
    none = -1 - 2
    found = layer([[0, none], [1, none], [0, 1], [-1, none]], experts=2)
    load = atlas.load_of(found)
    np.testing.assert_allclose(load["load"], [3 / 5, 2 / 5])
    assert load["dropped"] == 1 / 5 and load["unrouted"] == 1 / 4
    np.testing.assert_allclose(atlas.together(found), [[1, 1 / 3], [1 / 2, 1]])
    assert atlas.logged(found)["dropped_fraction"] == 1 / 5
    assert atlas.agreement(found, found) == 1


def test_load_where_experts_choose_counts_the_tokens_that_they_took():
    # Expert 0 took three tokens and expert 1 one of them; expert 2 none. No expert took token 3.
    absent = -1 - 3
    taken = [[0, 1, absent], [0, absent, absent], [0, absent, absent], [absent] * 3]
    one = dataclasses.replace(layer(taken, experts=3), experts_choose=True)
    found = atlas.load_of(one)
    np.testing.assert_allclose(found["load"], [3 / 4, 1 / 4, 0])
    assert (found["dead"], found["dropped"], found["unrouted"]) == ([2], 0, 1 / 4)
    np.testing.assert_allclose(atlas.together(one)[:2], [[1, 1 / 3, 0], [1, 1, 0]])
    # The first model has four pairs of token and expert; the other model has two of these pairs.
    other = dataclasses.replace(one, choices=np.roll(one.choices, 1, axis=0))
    assert atlas.agreement(one, other) == 2 / 4


def test_planted_labels_have_the_information_of_one_bit():
    # Label 0 goes to experts 0 and 1, label 1 to experts 2 and 3, half of the tokens each: the
    # expert tells the label, so the information is the entropy log 2 of the label, and purity is 1.
    found = atlas.layers_of(
        observed([layer([[0], [1], [2], [3]])], [5, 6, 5, 6], [0, 0, 1, 1]), np.array([0, 1])
    )[0]
    assert found["information"]["label"] == pytest.approx(math.log(2))
    assert found["purity"]["label"] == 1
    assert found["by_label"] == [[1, 0], [1, 0], [0, 1], [0, 1]]
    # Token 5 goes to experts 0 and 2, token 6 to 1 and 3: one bit as well, and so the positions.
    assert found["information"]["token"] == pytest.approx(math.log(2))
    assert found["information"]["position"] == pytest.approx(math.log(2))


def test_information_is_the_entropies_apart_minus_the_entropy_together():
    generator = np.random.default_rng(0)
    experts, values = generator.integers(0, 4, (2, 200))
    counts, _ = atlas.counts_by(layer(experts[:, None]), values)
    numbers = [np.unique(x, return_counts=True)[1] for x in (experts, values, 4 * experts + values)]
    apart, other, together = map(entropy, numbers)
    assert atlas.mutual_information(counts) == pytest.approx(apart + other - together)


def test_experts_of_one_token_are_together():
    # Expert 0 has three tokens, of which two also chose expert 1; both of expert 1 chose 0.
    found = atlas.together(layer([[0, 1], [1, 0], [0, 2]]))
    np.testing.assert_allclose(found[0], [1, 2 / 3, 1 / 3, 0])
    np.testing.assert_allclose(found[1], [1, 1, 0, 0])
    np.testing.assert_allclose(found[3], 0)


def test_agreement_counts_choices_in_any_order():
    assert atlas.agreement(layer([[0, 1], [2, 3]]), layer([[1, 0], [2, 1]])) == 3 / 4


def test_a_layer_predicts_the_next_on_other_documents():
    # On document 0, expert 0 is followed by 2, and 1 by 3. Document 1 follows the rule in three of
    # four cases. The most frequent next expert of document 0 is 2, as it is in two of four cases.
    first = layer([[0], [0], [1], [0], [0], [1], [1]])
    after = layer([[2], [2], [3], [2], [2], [3], [1]])
    found = atlas.predicted(first, after, np.array([0, 0, 0, 1, 1, 1, 1]))
    assert found == {"accuracy": 3 / 4, "chance": 2 / 4}
    assert atlas.predicted(first, after, np.zeros(7, int))["accuracy"] is None


def test_groups_and_their_gap():
    # Each token of group 0 costs 1 bit and of group 1 costs 2 bits, one byte per token; the last
    # token of a document has no next token. Of group 1, one of four choices is dropped. Two
    # documents are too few for an interval.
    bit = math.log(2)
    choices = layer([[0], [1], [0], [1], [0], [-1], [0], [1]])
    losses = [bit, np.nan, bit, np.nan, 2 * bit, np.nan, 2 * bit, np.nan]
    found = observed([choices], range(8), [0, 0, 1, 1, 2, 2, 3, 3], losses)
    labels, sizes = np.array([0, 0, 1, 1]), np.ones(4, int)
    groups = atlas.quality((found,), labels, ["a", "b"], sizes)
    assert [one["bits_per_byte"] for one in groups] == pytest.approx([1, 2])
    assert [one["dropped"] for one in groups] == [0, 1 / 4]
    gap = atlas.gap((found,), labels, ["a", "b"], sizes)
    assert (gap["worst"], gap["best"]) == ("b", "a")
    assert gap["bits_per_byte"] == pytest.approx(1) and gap["interval"] is None
    drops = gap["drops"]
    assert (drops["worst"], drops["best"], drops["dropped"]) == ("b", "a", 1 / 4)
    assert drops["interval"] is None
    assert atlas.gap((found,), labels * 0, ["a"], sizes) is None


def test_a_model_without_likelihoods_has_no_gap_of_its_loss():
    # An encoder and a decoder of one document per group: of the two choices of group 1, the one in
    # the encoder is dropped.
    nothing = [np.nan, np.nan]
    stacks = [
        observed([layer(choices)], [0, 1], [0, 1], nothing) for choices in ([[0], [-1]], [[1], [1]])
    ]
    labels, sizes = np.array([0, 1]), np.ones(2, int)
    first, second = atlas.quality(stacks, labels, ["a", "b"], sizes)
    assert first["loss"] is None and first["bits_per_byte"] is None and first["tokens"] == 2
    assert (first["dropped"], second["dropped"]) == (0, 1 / 2)
    found = atlas.gap(stacks, labels, ["a", "b"], sizes)
    assert list(found) == ["drops", "unrouted"] and found["drops"]["dropped"] == 1 / 2


def test_a_layer_has_the_numbers_that_alarms_read():
    # Expert 0 is chosen by three tokens and drops one, expert 1 by one; index 4 is a free expert.
    found = atlas.logged(layer([[0], [0], [-1], [1], [-5]]))
    np.testing.assert_allclose(found["load"], [2 / 3, 1 / 3, 0, 0])
    assert found["dropped_fraction"] == 1 / 4 and found["max_mean_load"] == 3


def test_passages_stay_in_their_document():
    gates = np.array([[0.5], [0.9], [0.5], [0.5]])
    found = observed([layer([[0], [0], [1], [0]], gates=gates)], [1, 2, 3, 1], [0, 0, 1, 1])
    one = atlas.passages(found, found.layers[0], 0, "<{}>".format, most=3)
    assert one["tokens"] == [{"piece": "<1>", "count": 2}, {"piece": "<2>", "count": 1}]
    assert one["passages"] == [["<1>", "<2>", ""]]
