import numpy as np
import pytest

from moe_jax.data import MixtureConfig, MixtureSource, make_mixture
from moe_jax.data.mixture import MarkovLanguages, symbols_to_text, text_to_symbols

CONFIG = MixtureConfig(num_languages=3, num_symbols=8, document_length=400, num_documents=300)


def test_two_state_chain_by_hand():
    transitions = np.array([[[0.9, 0.1], [0.5, 0.5]]])
    mixture = MarkovLanguages(transitions, np.array([[5 / 6, 1 / 6]]), document_length=3)
    rate = 5 / 6 * -(0.9 * np.log(0.9) + 0.1 * np.log(0.1)) + 1 / 6 * np.log(2)
    start = -(5 / 6 * np.log(5 / 6) + 1 / 6 * np.log(1 / 6))
    np.testing.assert_allclose(mixture.entropy_rates(), [rate])
    np.testing.assert_allclose(mixture.best_possible_loss(), (start + 2 * rate) / 3)
    np.testing.assert_allclose(mixture.document_nll('!!"'), [-np.log(5 / 6 * 0.9 * 0.1)])


def test_bayes_nll_of_two_languages_by_hand():
    transitions = np.array([[[0.9, 0.1], [0.5, 0.5]], [[0.2, 0.8], [0.5, 0.5]]])
    mixture = MarkovLanguages(transitions, np.full((2, 2), 0.5), document_length=2)
    expected = -np.log(0.5 * (0.5 * 0.9) + 0.5 * (0.5 * 0.2))
    np.testing.assert_allclose(mixture.bayes_nll("!!"), expected)


def test_rows_sum_to_one_and_initial_is_stationary():
    mixture = make_mixture(CONFIG)
    np.testing.assert_allclose(mixture.transitions.sum(-1), 1.0)
    np.testing.assert_allclose(mixture.initial.sum(-1), 1.0)
    moved = np.einsum("ki,kij->kj", mixture.initial, mixture.transitions)
    np.testing.assert_allclose(moved, mixture.initial, atol=1e-9)


def test_empirical_nll_agrees_with_the_entropy():
    source = MixtureSource(CONFIG, "train")
    mixture = source.mixture
    rates = mixture.entropy_rates()
    for language in range(3):
        documents = [source[i] for i in range(len(source)) if source.domain(i) == language]
        nll = [mixture.document_nll(text)[language] for text in documents]
        assert len(documents) > 60
        np.testing.assert_allclose(np.mean(nll) / 400, rates[language], rtol=0.03)


def test_bayes_costs_at_most_the_prior_more_than_the_true_language():
    source = MixtureSource(CONFIG, "eval")
    for index in range(20):
        nll = source.mixture.document_nll(source[index])
        bayes = source.mixture.bayes_nll(source[index])
        assert nll.min() - 1e-9 <= bayes <= nll[source.domain(index)] + np.log(3) + 1e-9
        assert nll.argmin() == source.domain(index)


def test_documents_depend_on_index_split_and_seed_only():
    train, again = MixtureSource(CONFIG, "train"), MixtureSource(CONFIG, "train")
    assert train[7] == again[7] and train.domain(7) == again.domain(7)
    assert len({train[0], train[1], MixtureSource(CONFIG, "eval")[0]}) == 3
    assert len(train[0]) == 400
    assert train.identity != MixtureSource(CONFIG, "eval").identity
    with pytest.raises(IndexError):
        train[300]


def test_symbols_round_trip_as_single_bytes():
    symbols = np.arange(94)
    text = symbols_to_text(symbols)
    assert len(text.encode("utf-8")) == 94
    np.testing.assert_array_equal(text_to_symbols(text, 94), symbols)


@pytest.mark.parametrize("text", ["", "~", " "])
def test_foreign_symbols_are_refused(text):
    with pytest.raises(ValueError, match="outside the 8 known"):
        text_to_symbols(text, 8)
