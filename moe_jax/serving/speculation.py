"""Speculative decoding: a drafter proposes tokens, and one step of the model checks all of them.

The token that a request samples after a context is a function of the context, of its seed and of
the number of the sample (``program.key_of``). A drafted token is right if the model samples the
same token there. So a request gets bit by bit the tokens that it gets without drafts, for every
temperature, and their distribution is that of the model. A drafted token is accepted with its
probability under the model, as by the rejection of Leviathan et al. 2023 (2211.17192) for a drafter
without randomness. A draft model samples with the keys of the model, so its errors alone lead to a
rejection: equal distributions give equal tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from moe_jax.errors import ConfigError
from moe_jax.models import Decoder, Model, ModelConfig
from moe_jax.ranges import Positive, Ranged
from moe_jax.run.sampling import check_can_generate
from moe_jax.serving.ahead import Ahead
from moe_jax.serving.program import StepShape, compiled, pages_of
from moe_jax.serving.resident import resident
from moe_jax.serving.running import StepDone, TokensRead, inputs_of, shape_for


@dataclasses.dataclass(frozen=True)
class NGram(Ranged):
    """Proposes the tokens that have followed the last tokens before (prompt lookup).

    Attributes:
        longest: Largest number of last tokens that must agree; fewer are tried after it.

    Examples:
        >>> from moe_jax.serving import NGram
        >>> NGram().after([1, 2, 3, 4, 9, 1, 2, 3], 2)
        (4, 9)
    """

    longest: Positive = 3

    def after(self, tokens: Sequence[int], number: int) -> tuple[int, ...]:
        """Returns at most ``number`` tokens; none if the last token is new.

        Args:
            tokens: Token ids of the prompt and of the sample.
            number: Largest number of proposed tokens.
        """
        history = np.asarray(tokens)
        for length in range(min(self.longest, len(history) - 1), 0, -1):
            windows = np.lib.stride_tricks.sliding_window_view(history[:-1], length)
            found = np.flatnonzero((windows == history[-length:]).all(axis=1))
            if len(found):
                start = found[-1] + length
                return tuple(history[start : start + number].tolist())
        return ()


@dataclasses.dataclass(frozen=True)
class DraftModel:
    """Proposes the tokens that a smaller decoder samples, one after the other.

    Attributes:
        model: Decoder with the vocabulary of the model that checks the drafts.
    """

    model: Model


@dataclasses.dataclass(frozen=True)
class LookaheadModule:
    """Proposes the tokens that the lookahead modules of the model itself predict, one per module.

    The modules are the multi-token prediction of DeepSeek-V3 (2412.19437, sections 2.2 and 5.4.3):
    ``model.lookahead`` of a run, or ``num_nextn_predict_layers`` of a released model.
    """


@dataclasses.dataclass(frozen=True)
class Speculation(Ranged):
    """The way to draft tokens.

    Attributes:
        drafter: Source of drafts.
        tokens: Largest number of drafted tokens per request and step; a lookahead module drafts
            one.
    """

    drafter: NGram | DraftModel | LookaheadModule = NGram()
    tokens: Positive = 4

    @property
    def reads_hidden(self) -> bool:
        """True if the drafter reads the hidden states of the model."""
        return isinstance(self.drafter, LookaheadModule)

    def most(self, model: Decoder) -> int:
        """Returns the largest number of drafts per request and step, for a model.

        Raises:
            ConfigError: If a draft model has another vocabulary or continues no text, or the model
                has no lookahead modules to draft with.
        """
        if isinstance(self.drafter, DraftModel):
            _draft_decoder(self.drafter.model, model)
        if not self.reads_hidden:
            return self.tokens
        check_looks_ahead(model.config)
        return min(self.tokens, model.config.lookahead)


def check_looks_ahead(config: ModelConfig) -> None:
    """Rejects models without lookahead modules.

    Raises:
        ConfigError: If the model has none.
    """
    if not getattr(config, "lookahead", 0):
        raise ConfigError(
            "the model has no lookahead module to draft with (model.lookahead=0): draft with "
            "ngram or with a smaller model"
        )


def _draft_decoder(draft: Model, model: Decoder) -> Decoder:
    """Returns a draft model, if it can draft for a model."""
    check_can_generate(draft.config)
    if not isinstance(draft, Decoder):
        raise ConfigError("a draft model continues prompts and has no encoder: use a decoder")
    theirs, ours = (each.embedding.table.shape[0] for each in (draft, model))
    if theirs != ours:
        raise ConfigError(
            f"the draft model has {theirs} token ids and the model has {ours}: draft with a "
            "model of the same tokenizer"
        )
    return draft


@dataclasses.dataclass
class Drafts:
    """Counts of drafted tokens.

    Attributes:
        proposed: Number of drafted tokens that the model has checked.
        accepted: Number of drafted tokens that the model has sampled too.
        tokens: Number of sampled tokens, with and without drafts.
        steps: Number of steps that have sampled them, counted once for each request in a step.
    """

    proposed: int = 0
    accepted: int = 0
    tokens: int = 0
    steps: int = 0

    def count(self, proposed: int, accepted: int, tokens: int) -> None:
        """Counts one request in one step that samples at least one token for it."""
        self.proposed += proposed
        self.accepted += accepted
        self.tokens += tokens
        self.steps += 1

    @property
    def acceptance(self) -> float:
        """Accepted share of the drafted tokens; 0 before the first."""
        return self.accepted / max(self.proposed, 1)

    @property
    def tokens_per_step(self) -> float:
        """Mean number of tokens that a request gets from a step; 0 before the first."""
        return self.tokens / max(self.steps, 1)


def agreeing(drafts: Sequence[int], sampled: Sequence[int]) -> int:
    """Returns the number of drafts before the first that differs from the sample in its place.

    Args:
        drafts: Drafted token ids.
        sampled: Tokens that the model samples after the context and after each draft, one more
            than there are drafts.
    """
    wrong = (place for place, draft in enumerate(drafts) if draft != sampled[place])
    return next(wrong, len(drafts))


class Drafter(Protocol):
    """A source of drafts for the steps of one engine."""

    def drafted(self, parts: Sequence[TokensRead], most: int) -> list[TokensRead]:
        """Returns the parts of a step, with at most ``most`` drafts for each that samples."""

    def read(self, done: StepDone) -> None:
        """Reads the tokens that the model has read in a step."""


def opened(
    speculation: Speculation | None,
    model: Decoder,
    programs: Mapping[StepShape, Any],
    entries: int,
) -> Drafter | None:
    """Returns the drafter of an engine; ``None`` without speculation.

    Args:
        speculation: The way to draft tokens.
        model: Model that checks the drafts.
        programs: Compiled steps of the model.
        entries: Number of entries of all pages.

    Raises:
        ConfigError: If a draft model has another vocabulary.
    """
    if speculation is None:
        return None
    if isinstance(speculation.drafter, NGram):
        return _Lookup(speculation.drafter)
    if isinstance(speculation.drafter, DraftModel):
        return _Sampler(speculation.drafter.model, model, programs, entries)
    return Ahead(model, programs, entries)


@dataclasses.dataclass(frozen=True)
class _Lookup:
    """Drafts of earlier tokens; see ``Drafter``."""

    table: NGram

    def drafted(self, parts: Sequence[TokensRead], most: int) -> list[TokensRead]:
        return [
            dataclasses.replace(part, drafts=self.table.after(part.request.tokens, room))
            if (room := part.room(most))
            else part
            for part in parts
        ]

    def read(self, done: StepDone) -> None:
        del done


class _Sampler:
    """Drafts of a model, whose entries are in the same pages as those of the checking model."""

    def __init__(
        self, draft: Model, model: Decoder, shapes: Iterable[StepShape], entries: int
    ) -> None:
        placed = resident(_draft_decoder(draft, model))
        self._leaves, self._layers = jax.tree.leaves(placed), pages_of(placed, entries)
        self._programs = compiled(placed, self._layers, shapes, 0)

    def drafted(self, parts: Sequence[TokensRead], most: int) -> list[TokensRead]:
        """Samples one token of all requests after the other; see ``Drafter``."""
        drafting = {row: part for row, part in enumerate(parts) if part.room(most)}
        for _ in range(most):
            now = {
                row: part for row, part in drafting.items() if len(part.drafts) < part.room(most)
            }
            if not now:
                break
            for (row, part), token in zip(now.items(), self._next(list(now.values())), strict=True):
                drafting[row] = dataclasses.replace(part, drafts=(*part.drafts, token))
        return [drafting.get(row, part) for row, part in enumerate(parts)]

    def _next(self, parts: Sequence[TokensRead]) -> list[int]:
        """Returns the token that the draft model samples after each part."""
        ahead = [_after_drafts(part, row) for row, part in enumerate(parts)]
        shape = shape_for(self._programs, ahead)
        program, inputs = self._programs[shape], inputs_of(ahead, shape)
        self._layers, samples = program(self._leaves, self._layers, inputs)
        return jax.device_get(samples.tokens)[: len(parts), 0].tolist()

    def read(self, done: StepDone) -> None:
        """Writes the entries of the tokens of a step; see ``Drafter``."""
        self._layers, _ = self._programs[done.shape](self._leaves, self._layers, done.inputs)


def _after_drafts(part: TokensRead, row: int) -> TokensRead:
    """Returns the part that reads the last draft, or the last token without drafts."""
    request, drafts = part.request, part.drafts
    held = dataclasses.replace(request.held, computed=request.held.computed + len(drafts))
    ahead = dataclasses.replace(request, held=held, tokens=[*request.tokens, *drafts])
    return TokensRead(part.slot, ahead, 1, row)
