"""A synthetic corpus whose best possible loss is known.

Each document is written in one of a few first-order Markov languages over one shared alphabet. A
model reaches the entropy of the languages only if it infers the language of each document, so the
corpus is a probe for expert specialisation. Symbols are printable ASCII characters, so the
tokenizer ``bytes`` has one token for each symbol.
"""

import bisect
import dataclasses
import functools

import numpy as np

from moe_jax.data.config import MixtureConfig

_FIRST_SYMBOL = ord("!")


@dataclasses.dataclass(frozen=True)
class MarkovLanguages:
    """Markov languages with a uniform prior.

    Attributes:
        transitions: Transition probabilities, (languages, symbols, symbols); rows sum to 1.
        initial: Stationary distribution of each language, (languages, symbols); the first symbol is
            drawn from it.
        document_length: Number of symbols in a document.
    """

    transitions: np.ndarray
    initial: np.ndarray
    document_length: int

    def entropy_rates(self) -> np.ndarray:
        """Returns the entropy rate of each language, (languages,), in nats per symbol."""
        return np.sum(self.initial * _entropy(self.transitions), axis=-1)

    def best_possible_loss(self) -> float:
        """Returns the expected loss of the true model, given the language of each document.

        Returns:
            Nats per symbol over whole documents, the first symbol included and the end-of-document
            token left out. Divide by ln 2 for bits per symbol, which are bits per byte.
        """
        per_document = _entropy(self.initial) + (self.document_length - 1) * self.entropy_rates()
        return float(per_document.mean() / self.document_length)

    def document_nll(self, text: str) -> np.ndarray:
        """Returns the exact negative log-likelihood of a document under each language.

        Args:
            text: A document of this mixture.

        Returns:
            Negative log-likelihoods, (languages,), in nats; infinite if the language cannot have
            written the document.
        """
        symbols = text_to_symbols(text, self.initial.shape[-1])
        with np.errstate(divide="ignore"):
            first = np.log(self.initial[:, symbols[0]])
            rest = np.log(self.transitions[:, symbols[:-1], symbols[1:]]).sum(axis=-1)
        return -(first + rest)

    def bayes_nll(self, text: str) -> float:
        """Returns the exact negative log-likelihood, in nats, of a document in an unknown language.

        No model that has to infer the language from the document can reach a lower loss.
        """
        nll = self.document_nll(text)
        least = nll.min()
        return float(least - np.log(np.mean(np.exp(least - nll))))


def make_mixture(config: MixtureConfig) -> MarkovLanguages:
    """Draws the languages of ``config``; the same config always gives the same languages."""
    rng = np.random.default_rng([config.seed, 0])
    shape = (config.num_languages, config.num_symbols)
    transitions = rng.dirichlet(np.full(config.num_symbols, config.concentration), size=shape)
    # A small uniform share keeps every chain ergodic, so the stationary distribution is unique.
    transitions = 0.99 * transitions + 0.01 / config.num_symbols
    initial = np.stack([_stationary(matrix) for matrix in transitions])
    return MarkovLanguages(transitions, initial, config.document_length)


def symbols_to_text(symbols: np.ndarray) -> str:
    """Renders symbol indices as printable ASCII characters."""
    return (np.asarray(symbols) + _FIRST_SYMBOL).astype(np.uint8).tobytes().decode("ascii")


def text_to_symbols(text: str, num_symbols: int) -> np.ndarray:
    """Inverts ``symbols_to_text``.

    Args:
        text: Text of at least one character; all characters are in the alphabet.
        num_symbols: Size of the alphabet.

    Returns:
        Symbol indices, (len(text),), int64.

    Raises:
        ValueError: ``text`` is empty or has a character outside the alphabet.
    """
    symbols = np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int64) - _FIRST_SYMBOL
    if symbols.size == 0 or symbols.min() < 0 or symbols.max() >= num_symbols:
        raise ValueError(f"the text is empty or has a symbol outside the {num_symbols} known ones.")
    return symbols


@dataclasses.dataclass(frozen=True)
class MixtureSource:
    """The documents of a mixture; each document is computed from its index on request.

    Attributes:
        config: Settings of the mixture.
        split: Split, ``train`` or ``eval``; the splits share languages and no document.
    """

    config: MixtureConfig
    split: str

    @functools.cached_property
    def mixture(self) -> MarkovLanguages:
        """Languages of the mixture."""
        return make_mixture(self.config)

    @property
    def identity(self) -> str:
        """Identity of the documents."""
        return f"{self.config!r}/{self.split}"

    @property
    def size(self) -> int:
        """Total bytes of all documents."""
        return len(self) * self.config.document_length

    def __len__(self) -> int:
        """Returns the number of documents."""
        train = self.split == "train"
        return self.config.num_documents if train else self.config.num_eval_documents

    def __getitem__(self, index: int) -> str:
        """Returns the text of document ``index``."""
        rng = self._rng(index)
        initial, rows = self._cumulative[self._language(rng)]
        draws = rng.random(self.config.document_length).tolist()
        last = self.config.num_symbols - 1
        symbols = [min(bisect.bisect_right(initial, draws[0]), last)]
        for draw in draws[1:]:
            symbols.append(min(bisect.bisect_right(rows[symbols[-1]], draw), last))
        return symbols_to_text(np.array(symbols))

    def domain(self, index: int) -> int:
        """Returns the language of a document, 0 to ``num_languages`` - 1."""
        return self._language(self._rng(index))

    def _rng(self, index: int) -> np.random.Generator:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        stream = 1 if self.split == "train" else 2
        return np.random.default_rng([self.config.seed, stream, index])

    def _language(self, rng: np.random.Generator) -> int:
        return int(rng.integers(self.config.num_languages))

    @functools.cached_property
    def _cumulative(self) -> list[tuple[list[float], list[list[float]]]]:
        initial = np.cumsum(self.mixture.initial, axis=-1).tolist()
        rows = np.cumsum(self.mixture.transitions, axis=-1).tolist()
        return list(zip(initial, rows, strict=True))


def _entropy(probabilities: np.ndarray) -> np.ndarray:
    """Returns the entropy over the last axis, in nats."""
    positive = np.where(probabilities > 0, probabilities, 1.0)
    return -np.sum(positive * np.log(positive), axis=-1)


def _stationary(matrix: np.ndarray) -> np.ndarray:
    """Returns the stationary distribution of ``matrix`` (row-stochastic)."""
    size = len(matrix)
    equations = np.vstack([matrix.T - np.eye(size), np.ones(size)])
    target = np.append(np.zeros(size), 1.0)
    solution = np.clip(np.linalg.lstsq(equations, target, rcond=None)[0], 0.0, None)
    return solution / solution.sum()
