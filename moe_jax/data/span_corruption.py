"""T5's span corruption: spans of a text are cut out and a decoder writes them down again.

The objective of Raffel et al. 2020 (arXiv 1910.10683, sections 3.1.4 and 3.3.4), which the Switch
Transformer (arXiv 2101.03961) pre-trains on too: 15 % of the tokens are noise, in spans of 3 on
average, and each span is replaced by one sentinel token of its own. The reference is
`t5/data/preprocessors.py` of google-research/text-to-text-transfer-transformer:

* the inputs are the text with each noise span replaced by a sentinel, then EOS;
* the targets are the text with each non-noise span replaced by a sentinel, then EOS.

So the targets end with a sentinel where the text ends with a non-noise span, as in figure 2 of the
paper. A mask of `random_spans_noise_mask` always ends with noise; training never sees that case.
"""

import dataclasses
from typing import Annotated

import numpy as np

from moe_jax.errors import ConfigError
from moe_jax.ranges import Growth, Range, Ranged, Vocabulary

Density = Annotated[float, Range(0, 1, above=True, below=True)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spans(Ranged):
    """How much of a text is cut out; the defaults are those of T5 and Switch.

    Attributes:
        noise_density: Share of a text's tokens that are noise, in (0, 1).
        mean_span_length: Tokens in a noise span on average, at least 1.
        sentinels: Ids above the tokenizer's that mark the spans: `<extra_id_0>` is the highest.
    """

    noise_density: Density = 0.15
    mean_span_length: Growth = 3.0
    sentinels: Vocabulary = 100

    def lengths(self, inputs_length: int = 512) -> tuple[int, int]:
        """Text and targets that fill `inputs_length` without padding.

        T5's `random_spans_helper`; (568, 114) for 512 at the defaults. It differs from T5 only
        where T5's estimate has no noise span (at the defaults, texts below 10 tokens): there this
        counts the one span that the mask has, so that the inputs always fit.

        Args:
            inputs_length: Tokens of the corrupted inputs, EOS included; at least 3.

        Returns:
            `tokens_length`, the largest number of raw tokens whose inputs fit, and
            `targets_length`, the number of their targets, EOS included.

        Raises:
            ConfigError: `inputs_length` is too short, or such a text needs more spans than there
                are sentinels or tokens to keep between them.
        """
        if inputs_length < 3:
            raise ConfigError(f"inputs_length={inputs_length} must be at least 3")
        tokens_length = inputs_length - 1
        # Inputs never shrink as the text grows, so the first text too long ends the search.
        while self._corrupted_lengths(tokens_length + 1)[0] <= inputs_length:
            tokens_length += 1
        self._checked_counts(tokens_length)
        targets_length = self._corrupted_lengths(tokens_length)[1]
        # T5 gives up one token at density 0.5 to have targets no longer than inputs.
        if self.noise_density == 0.5 and targets_length > inputs_length:
            return tokens_length - 1, targets_length - 1
        return tokens_length, targets_length

    def _counts(self, length: int) -> tuple[int, int]:
        """Noise tokens and noise spans of a text, ties rounded to even as in T5."""
        # T5 rounds its masks in float32 and its lengths in float64, which disagree at 190 tokens.
        noise = min(max(round(length * self.noise_density), 1), length - 1)
        return noise, max(round(noise / self.mean_span_length), 1)

    def _checked_counts(self, length: int) -> tuple[int, int]:
        """`_counts`, refusing a text that cannot be corrupted."""
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
        """Inputs and targets of a text of `length` tokens, EOS included in both."""
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
        vocab_size: Ids of the model, sentinels included; the text's ids lie below the sentinels.
        eos_id: Closes inputs and targets.
        pad_id: Fills them up, and is the first input of the decoder.
    """

    vocab_size: int
    eos_id: int = 1
    pad_id: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigError where a field is out of range."""
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
        """(sentinels,) int32 ids in the order of use: T5's <extra_id_0> is the highest id."""
        return np.arange(self.vocab_size - 1, self._first_reserved - 1, -1, dtype=np.int32)

    def random_spans_noise_mask(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """Draws which tokens are noise (section 3.3.4; T5's function of the same name).

        The numbers of noise tokens and of spans follow from `length` alone. Non-noise and noise
        spans alternate, beginning with non-noise; all such masks are equally likely.

        Args:
            length: Tokens in the text, at least 2.
            rng: Source of the draws.

        Returns:
            (length,) bool, True for noise; the first is False and the last True.

        Raises:
            ConfigError: The text is too short, or needs more spans than there are sentinels or
                tokens to keep between them.
        """
        noise, spans = self._checked_counts(length)
        kept_lengths = _random_segmentation(length - noise, spans, rng)
        noise_lengths = _random_segmentation(noise, spans, rng)
        interleaved = np.stack([kept_lengths, noise_lengths], axis=1).ravel()
        return np.repeat(np.tile([False, True], spans), interleaved)

    def corrupt(self, tokens: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cuts the noise out of a text (section 3.1.4, figure 2).

        As in T5, sentinels are only counted: inputs number the noise spans and targets the
        non-noise spans. For a mask that starts with noise the targets therefore begin with that
        span and no sentinel, and every later span follows the sentinel before its own.

        Args:
            tokens: (length,) integer ids of the text, without EOS.
            mask: (length,) bool, True for noise.

        Returns:
            `inputs`, (non-noise tokens + noise spans + 1,), and `targets`,
            (noise tokens + non-noise spans + 1,), both int32 and closed by EOS.

        Raises:
            ConfigError: The shapes or types do not fit, there are more spans than sentinels, or
                the text has an id that is a sentinel or outside the vocabulary.
        """
        tokens, mask = np.asarray(tokens), np.asarray(mask)
        self._check_text(tokens)
        if mask.dtype != np.bool_ or mask.shape != tokens.shape:
            raise ConfigError(
                f"the mask must be bool of the tokens' shape {tokens.shape}, "
                f"got {mask.dtype} {mask.shape}"
            )
        # The two counts pair span i with sentinel i only because masks start with non-noise.
        return self._replace_runs(tokens, mask), self._replace_runs(tokens, ~mask)

    def example(
        self,
        tokens: np.ndarray,
        rng: np.random.Generator,
        inputs_length: int = 512,
        targets_length: int = 0,
    ) -> dict[str, np.ndarray]:
        """One training example of fixed shapes.

        Args:
            tokens: (length,) integer ids of a text without EOS, 2 to `lengths(inputs_length)[0]`.
            rng: Source of the mask.
            inputs_length: Tokens of the encoder, EOS included.
            targets_length: Those of the decoder; 0 for `lengths(inputs_length)[1]`, the fewest.

        Returns:
            int32 arrays, (inputs_length,) of the inputs and (targets_length,) of the targets:

            * `inputs`, `targets`: see `corrupt`, filled up with `pad_id`.
            * `decoder_inputs`: the targets shifted right by one, `pad_id` first.
            * `inputs_segments`, `targets_segments`: 1 for tokens and EOS, 0 for padding.
            * `targets_places`: the token of the text that a target repeats; a sentinel stands for
              the first that it replaces, EOS and padding for the last of all.

        Raises:
            ConfigError: The text is too short or too long, or see `corrupt` and `lengths`.
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
        """The lowest sentinel id."""
        return self.vocab_size - self.sentinels

    def _replace_runs(self, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Replaces each run of `mask` by the next sentinel and appends EOS."""
        starts = _starts(mask)
        count = np.count_nonzero(starts)
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
                f"{self._first_reserved - 1}; the sentinels need vocab_size to exceed the "
                f"tokenizer's by {self.sentinels}"
            )


def _random_segmentation(items: int, segments: int, rng: np.random.Generator) -> np.ndarray:
    """(segments,) positive lengths that sum to `items`, uniform over all such divisions."""
    cuts = 1 + np.sort(rng.choice(items - 1, segments - 1, replace=False))
    return np.diff(cuts, prepend=0, append=items)


def _starts(mask: np.ndarray) -> np.ndarray:
    """(length,) bool, the first of each run of `mask`."""
    return mask & np.diff(mask, prepend=False)


def _kept(mask: np.ndarray) -> np.ndarray:
    """(length,) bool, what stays if one token stands for each run of `mask`."""
    return _starts(mask) | ~mask


def _pad(values: np.ndarray, length: int, fill: int) -> np.ndarray:
    """(length,) `values` followed by `fill`."""
    return np.append(values, np.full(length - len(values), fill, values.dtype))
