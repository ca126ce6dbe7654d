"""Losses to compare a run with: simple byte models, and the true model of the mixture."""

import dataclasses
import zlib

import numpy as np

from moe_jax.data.config import DataConfig
from moe_jax.data.mixture import make_mixture
from moe_jax.data.source import Source
from moe_jax.data.sources import open_source
from moe_jax.data.tokenizer import Tokenizer

_TRAINING_BYTES = 64_000_000
_BLOCK = 1 << 20


def baselines(config: DataConfig) -> dict[str, float]:
    """Returns the bits per byte of three models on the documents of ``eval_batches``.

    Args:
        config: The data config.

    Returns:
        ``uniform`` (8), ``order2`` (see ``fit_order2``) and ``zlib`` (level 9, each document
        alone).

    Raises:
        FileNotFoundError: See ``open_source``.
        ValueError: See ``open_source``; or the validation documents hold no byte.
    """
    evaluation = open_source(config, "eval")
    texts = [evaluation[index].encode("utf-8") for index in range(len(evaluation))]
    total = sum(map(len, texts))
    if total == 0:
        raise ValueError(f"the validation documents of {config.source!r} hold no byte.")
    compressed = sum(len(zlib.compress(text, 9)) for text in texts)
    training = _first_bytes(open_source(config, "train"))
    return {
        "uniform": 8.0,
        "order2": fit_order2(training).bits(texts) / total,
        "zlib": 8.0 * compressed / total,
    }


def best_possible_loss(config: DataConfig, tokenizer: Tokenizer) -> float:
    """Returns the loss, in nats per target, of the true model of the source ``mixture``.

    The true model knows the languages and their prior, and infers the language of each document.
    The end token costs it nothing, since all documents have the same length. The model reads each
    document whole: rows that cut documents are harder.

    Args:
        config: The data config; its source must be ``mixture``.
        tokenizer: Tokenizer of the run; a target is one of its tokens or the end token.

    Raises:
        ValueError: The source is not ``mixture``.
    """
    if config.source != "mixture":
        raise ValueError(f"the best possible loss of {config.source!r} is not known.")
    mixture, source = make_mixture(config.mixture), open_source(config, "eval")
    texts = [source[index] for index in range(len(source))]
    targets = sum(len(tokenizer.encode(text)) + 1 for text in texts)
    return sum(map(mixture.bayes_nll, texts)) / targets


@dataclasses.dataclass(frozen=True)
class Order2Model:
    """A byte model with a context of two bytes.

    Attributes:
        counts: Trigram counts, (65536, 256), indexed by context and byte.
        totals: Count of each context, (65536,).
        kinds: Number of different bytes seen after each context, (65536,).
        order1: Probability of a byte after one byte, (256, 256).
    """

    counts: np.ndarray
    totals: np.ndarray
    kinds: np.ndarray
    order1: np.ndarray

    def bits(self, documents: list[bytes]) -> float:
        """Returns the bits of all bytes of ``documents``; each begins after two zero bytes."""
        bits = 0.0
        trigrams = _trigrams(documents)
        for start in range(0, len(trigrams), _BLOCK):
            block = trigrams[start : start + _BLOCK]
            context, last = block >> 8, block & 255
            probability = _witten_bell(
                self.counts[context, last],
                self.totals[context],
                self.kinds[context],
                self.order1[context & 255, last],
            )
            bits -= float(np.log2(probability).sum())
        return bits


def fit_order2(documents: list[bytes]) -> Order2Model:
    """Fits the model to ``documents``; each document begins after two zero bytes.

    Each order backs off to the order below with the weight of Witten and Bell (1991):
    kinds of successors / (count + kinds of successors).
    """
    counts = np.bincount(_trigrams(documents), minlength=1 << 24).reshape(-1, 256)
    pairs = counts.reshape(256, 256, 256).sum(axis=0)
    singles = pairs.sum(axis=0)
    order0 = (singles + 1) / (singles.sum() + 256)
    kinds = np.count_nonzero(pairs, axis=-1)[:, None]
    order1 = _witten_bell(pairs, pairs.sum(axis=-1)[:, None], kinds, order0)
    return Order2Model(counts, counts.sum(axis=-1), np.count_nonzero(counts, axis=-1), order1)


def _witten_bell(
    count: np.ndarray, total: np.ndarray, kinds: np.ndarray, below: np.ndarray
) -> np.ndarray:
    seen = (count + kinds * below) / np.maximum(total + kinds, 1)
    return np.where(total > 0, seen, below)


def _trigrams(documents: list[bytes]) -> np.ndarray:
    """Returns each byte with the two bytes before it, as an integer a * 65536 + b * 256 + c."""
    joined = np.frombuffer(b"".join(b"\0\0" + text for text in documents), np.uint8)
    joined = joined.astype(np.int32)
    codes = (joined[:-2] << 16) | (joined[1:-1] << 8) | joined[2:]
    # Trigrams that end in the two leading zeros of a document are not bytes of the document.
    lengths = np.array([len(text) for text in documents])
    starts = np.concatenate([[0], np.cumsum(lengths + 2)[:-1]]) if len(lengths) else lengths
    keep = np.ones(len(joined), bool)
    keep[starts] = keep[starts + 1] = False
    return codes[keep[2:]]


def _first_bytes(source: Source) -> list[bytes]:
    """Returns the first documents, up to ``_TRAINING_BYTES`` in all."""
    texts, left = [], _TRAINING_BYTES
    for index in range(len(source)):
        texts.append(source[index].encode("utf-8")[:left])
        left -= len(texts[-1])
        if left <= 0:
            break
    return texts
