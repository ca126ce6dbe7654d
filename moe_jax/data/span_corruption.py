"""Span corruption of T5: spans of a text are cut out, and a decoder restores them.

The objective is defined by Raffel et al. 2020 (arXiv 1910.10683, sections 3.1.4 and 3.3.4); the
Switch Transformer (arXiv 2101.03961) pre-trains on it too. 15 % of the tokens are noise, in spans
of 3 tokens on average, and a separate sentinel token replaces each span. The reference is
``t5/data/preprocessors.py`` of google-research/text-to-text-transfer-transformer:

* The inputs are the text with each noise span replaced by a sentinel, then EOS.
* The targets are the text with each non-noise span replaced by a sentinel, then EOS.

If the text ends with a non-noise span, the targets therefore end with a sentinel, as in figure 2 of
the paper. A mask of ``random_spans_noise_mask`` always ends with noise, so this case does not occur
in training.
"""

import dataclasses
from typing import Annotated

import numpy as np

from moe_jax.errors import ConfigError
from moe_jax.ranges import Growth, Range, Ranged, Vocabulary

Density = Annotated[float, Range(0, 1, above=True, below=True)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spans(Ranged):
    """Noise spans of span corruption; the defaults are the values of T5 and Switch.

    Attributes:
        noise_density: Share of the tokens of a text that are cut out, in (0, 1).
        mean_span_length: Mean number of tokens in a noise span, at least 1.
        sentinels: Number of sentinels, which mark the spans and have the ids above the tokenizer's;
            ``<extra_id_0>`` is the highest id.
    """

    noise_density: Density = 0.15
    mean_span_length: Growth = 3.0
    sentinels: Vocabulary = 100

    def lengths(self, inputs_length: int = 512) -> tuple[int, int]:
        """Returns the lengths of text and targets that fill ``inputs_length`` without padding.

        The function matches ``random_spans_helper`` of T5: (568, 114) for 512 at the defaults. It
        differs only if the estimate of T5 has no noise span (at the defaults, texts below 10
        tokens): this function then counts the one span of the mask, so that the inputs always fit.

        Args:
            inputs_length: Number of tokens of the corrupted inputs, EOS included; at least 3.

        Returns:
            ``tokens_length``, the largest number of raw tokens whose inputs fit, and
            ``targets_length``, the number of their targets, EOS included.

        Raises:
            ConfigError: ``inputs_length`` is too short, or the text needs more spans than there are
                sentinels or non-noise tokens to separate them.
        """
        if inputs_length < 3:
            raise ConfigError(f"inputs_length={inputs_length} must be at least 3")
        tokens_length = inputs_length - 1
        # Inputs never shrink as the text grows, so the first text that is too long ends the search.
        while self._corrupted_lengths(tokens_length + 1)[0] <= inputs_length:
            tokens_length += 1
        self._checked_counts(tokens_length)
        targets_length = self._corrupted_lengths(tokens_length)[1]
        # At density 0.5, T5 drops one token so that the targets are no longer than the inputs.
        if self.noise_density == 0.5 and targets_length > inputs_length:
            return tokens_length - 1, targets_length - 1
        return tokens_length, targets_length

    def _counts(self, length: int) -> tuple[int, int]:
        """Returns the numbers of noise tokens and noise spans; ties round to even as in T5."""
        # T5 rounds its masks in float32 and its lengths in float64, which disagree at 190 tokens.
        noise = min(max(round(length * self.noise_density), 1), length - 1)
        return noise, max(round(noise / self.mean_span_length), 1)

    def _checked_counts(self, length: int) -> tuple[int, int]:
        """Returns ``_counts``; rejects a text that cannot be corrupted."""
        if length < 2:
            raise ConfigError(f"a text of {length} token(s) is too short; it needs at least 2")
        noise, spans = self._counts(length)
        self._check_sentinels(spans)
        if spans > length - noise:
            raise ConfigError(
                f"{spans} noise spans cannot be kept apart by the {length - noise} other tokens of "
                f"a text of {length}; lower noise_density={self.noise_density} or raise "
                f"mean_span_length={self.mean_span_length}"
            )
        return noise, spans

    def _corrupted_lengths(self, length: int) -> tuple[int, int]:
        """Returns the lengths of inputs and targets of a text, EOS included."""
        noise, spans = self._counts(length)
        return length - noise + spans + 1, noise + spans + 1

    def _check_sentinels(self, spans: int) -> None:
        if spans > self.sentinels:
            raise ConfigError(
                f"{spans} spans need as many sentinels, but sentinels={self.sentinels}; raise it "
                "or shorten the text"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanCorruption(Spans):
    """The corruption of texts in one vocabulary.

    Attributes:
        vocab_size: Number of ids, sentinels included; the ids of a text lie below the sentinels.
        eos_id: End token, which closes inputs and targets.
        pad_id: Padding token, which is also the first input of the decoder.
    """

    vocab_size: int
    eos_id: int = 1
    pad_id: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigError if a field is out of range."""
        super().__post_init__()
        if self.pad_id == self.eos_id:
            raise ConfigError(f"pad_id and eos_id are both {self.pad_id}; they must differ")
        for name in ("eos_id", "pad_id"):
            if not 0 <= getattr(self, name) < self._first_reserved:
                raise ConfigError(
                    f"{name}={getattr(self, name)} must be at least 0 and below the sentinels, "
                    f"which are the last {self.sentinels} of vocab_size={self.vocab_size} ids"
                )

    @property
    def sentinel_ids(self) -> np.ndarray:
        """Sentinel ids in the order of use, (sentinels,), int32; ``<extra_id_0>`` is highest."""
        return np.arange(self.vocab_size - 1, self._first_reserved - 1, -1, dtype=np.int32)

    def random_spans_noise_mask(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """Draws the noise mask of a text (section 3.3.4; the T5 function of the same name).

        The numbers of noise tokens and of spans depend on ``length`` only. Non-noise and noise
        spans alternate, non-noise first; all such masks are equally likely.

        Args:
            length: Number of tokens in the text, at least 2.
            rng: Random generator of the mask.

        Returns:
            Noise mask, (length,), bool, True for noise; the first entry is False and the last True.

        Raises:
            ConfigError: The text is too short, or needs more spans than there are sentinels or
                non-noise tokens to separate them.
        """
        noise, spans = self._checked_counts(length)
        plain_lengths = _random_segmentation(length - noise, spans, rng)
        noise_lengths = _random_segmentation(noise, spans, rng)
        interleaved = np.stack([plain_lengths, noise_lengths], axis=1).ravel()
        return np.repeat(np.tile([False, True], spans), interleaved)

    def corrupt(self, tokens: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cuts the noise out of a text (section 3.1.4, figure 2).

        As in T5, the inputs number the noise spans and the targets number the non-noise spans,
        independently. If a mask starts with noise, the targets therefore begin with the first span
        without a sentinel, and every later span follows the sentinel of the span before it.

        Args:
            tokens: Token ids of the text, (length,), integers, without EOS.
            mask: Noise mask, (length,), bool, True for noise.

        Returns:
            ``inputs``, (non-noise tokens + noise spans + 1,), and ``targets``,
            (noise tokens + non-noise spans + 1,), both int32 and closed by EOS.

        Raises:
            ConfigError: Shapes or types do not fit, there are more spans than sentinels, or the
                text has an id that is a sentinel or outside the vocabulary.
        """
        tokens, mask = np.asarray(tokens), np.asarray(mask)
        self._check_text(tokens)
        if mask.dtype != np.bool_ or mask.shape != tokens.shape:
            raise ConfigError(
                f"the mask must be bool of the tokens' shape {tokens.shape}, "
                f"got {mask.dtype} {mask.shape}"
            )
        # Span i has sentinel i in inputs and targets only if the mask starts with non-noise.
        return self._replace_runs(tokens, mask), self._replace_runs(tokens, ~mask)

    def example(
        self,
        tokens: np.ndarray,
        rng: np.random.Generator,
        inputs_length: int = 512,
        targets_length: int = 0,
    ) -> dict[str, np.ndarray]:
        """Returns one training example of fixed shapes.

        Args:
            tokens: Token ids of a text without EOS, (length,), integers; 2 to
                ``lengths(inputs_length)[0]`` tokens.
            rng: Random generator of the mask.
            inputs_length: Number of tokens of the encoder, EOS included.
            targets_length: Number of tokens of the decoder, EOS included; 0 for
                ``lengths(inputs_length)[1]``, the smallest number.

        Returns:
            int32 arrays, (inputs_length,) for the inputs and (targets_length,) for the targets:

            * ``inputs``, ``targets``: Tokens of ``corrupt``, padded with ``pad_id``.
            * ``decoder_inputs``: Targets shifted right by one, ``pad_id`` first.
            * ``inputs_segments``, ``targets_segments``: 1 for tokens and EOS, 0 for padding.
            * ``targets_places``: Position in the text of the token that a target repeats. A
              sentinel has the position of the first token that it replaces; EOS and padding have
              the position of the last token.

        Raises:
            ConfigError: The text is too short or too long; see also ``corrupt`` and ``lengths``.
        """
        tokens = np.asarray(tokens)
        longest, fewest = self.lengths(inputs_length)
        targets_length = targets_length or fewest
        if tokens.size > longest:
            raise ConfigError(
                f"a text of {tokens.size} tokens is too long: inputs_length={inputs_length} holds "
                f"{longest}; split the text"
            )
        if targets_length < fewest:
            raise ConfigError(
                f"targets_length={targets_length} is too short: inputs of {inputs_length} tokens "
                f"have up to {fewest} targets"
            )
        mask = self.random_spans_noise_mask(tokens.size, rng)
        inputs, targets = self.corrupt(tokens, mask)
        padded_targets = _pad(targets, targets_length, self.pad_id)
        places = np.flatnonzero(_kept(~mask)).astype(np.int32)
        return {
            "inputs": _pad(inputs, inputs_length, self.pad_id),
            "targets": padded_targets,
            "decoder_inputs": np.insert(padded_targets[:-1], 0, self.pad_id),
            "inputs_segments": _pad(np.ones_like(inputs), inputs_length, 0),
            "targets_segments": _pad(np.ones_like(targets), targets_length, 0),
            "targets_places": _pad(places, targets_length, tokens.size - 1),
        }

    @property
    def _first_reserved(self) -> int:
        """Lowest sentinel id."""
        return self.vocab_size - self.sentinels

    def _replace_runs(self, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Replaces each run of ``mask`` by the next sentinel and appends EOS."""
        starts = _starts(mask)
        count = int(np.count_nonzero(starts))
        self._check_sentinels(count)
        replaced = tokens.astype(np.int32)
        replaced[starts] = self.sentinel_ids[:count]
        return np.append(replaced[_kept(mask)], np.int32(self.eos_id))

    def _check_text(self, tokens: np.ndarray) -> None:
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise ConfigError(
                f"tokens must be a vector of integers, got {tokens.dtype} {tokens.shape}"
            )
        wrong = tokens[(tokens < 0) | (tokens >= self._first_reserved)]
        if wrong.size:
            raise ConfigError(
                f"the text has the id {wrong[0]}, but its ids must be 0 to "
                f"{self._first_reserved - 1}; vocab_size must exceed the vocabulary of the "
                f"tokenizer by {self.sentinels} sentinels"
            )


def _random_segmentation(items: int, segments: int, rng: np.random.Generator) -> np.ndarray:
    """Returns positive lengths, (segments,), with the sum ``items``, uniform over all divisions."""
    cuts = 1 + np.sort(rng.choice(items - 1, segments - 1, replace=False))
    return np.diff(cuts, prepend=0, append=items)


def _starts(mask: np.ndarray) -> np.ndarray:
    """Returns the first token of each run of ``mask`` as a mask, (length,), bool."""
    return mask & np.diff(mask, prepend=False)


def _kept(mask: np.ndarray) -> np.ndarray:
    """Returns ~``mask`` plus the first token of each run of ``mask``, (length,), bool."""
    return _starts(mask) | ~mask


def _pad(values: np.ndarray, length: int, fill: int) -> np.ndarray:
    """Returns ``values`` padded with ``fill`` to (length,)."""
    return np.append(values, np.full(length - len(values), fill, values.dtype))
