"""Samples text: a decoder continues a prompt, and an encoder-decoder fills its blanks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from flax import nnx

from moe_jax import data, decoding
from moe_jax.decoding import Sampling
from moe_jax.errors import ConfigError
from moe_jax.models import Decoder, DecoderConfig, EncoderDecoder, Model, ModelConfig
from moe_jax.models.adapters import merged
from moe_jax.models.decoder import NOT_CAUSAL
from moe_jax.run.session import Session
from moe_jax.training.state import TrainState


@runtime_checkable
class MarksBlanks(Protocol):
    """A tokenizer with a sentinel id for each blank of a text."""

    def encode_blanks(self, text: str) -> np.ndarray:
        """Returns the token ids ``(L,)`` of a text with blanks ``<extra_id_0>``, ..."""
        ...


def check_can_generate(config: ModelConfig) -> None:
    """Rejects models that read later tokens, by attention or because experts choose tokens.

    Raises:
        ConfigError: If the model is not causal, or a router of the decoder lets experts choose.
    """
    if not getattr(config, "causal", True):
        raise ConfigError(NOT_CAUSAL)
    layers = config.sparse_layers()
    if any(layer.moe.router.experts_choose and layer.stack != "encoder" for layer in layers):
        raise ConfigError(
            "in this model experts choose among tokens, later ones included, so it cannot "
            "generate text; train a variant in which tokens choose experts"
        )


def check_continues(config: ModelConfig) -> None:
    """Rejects models that continue no text.

    Raises:
        ConfigError: If the model is an encoder-decoder, or cannot generate text.
    """
    if not isinstance(config, DecoderConfig):
        raise ConfigError("an encoder-decoder fills blanks and continues no text: use a decoder")
    check_can_generate(config)


def generate(
    session: Session, state: TrainState, prompts: list[str], sampling: Sampling
) -> list[str]:
    """Returns a sample of a run's model for each prompt; see ``texts``."""
    model = merged(nnx.merge(session.graph, state.params, state.router_state))
    window = session.experiment.data.seq_length
    return texts(model, session.tokenizer, prompts, sampling, window)


def texts(
    model: Model,
    tokenizer: data.Tokenizer,
    prompts: list[str],
    sampling: Sampling,
    window: int | None = None,
) -> list[str]:
    """Returns a sample of a model for each prompt.

    A decoder continues the prompt. An encoder-decoder fills the blanks ``<extra_id_0>``,
    ``<extra_id_1>``, ... of the prompt.

    Args:
        model: Decoder or encoder-decoder.
        tokenizer: Tokenizer of the model.
        prompts: Texts to continue or to fill.
        sampling: Sampling settings; any end token of the tokenizer ends a text.
        window: Number of prompt tokens that the model reads, the last ones for a decoder and the
            first ones for an encoder; ``None`` for all.

    Raises:
        ConfigError: If the model cannot generate text.
    """
    check_can_generate(model.config)
    sampling = dataclasses.replace(sampling, eos_id=data.end_ids(tokenizer))
    if isinstance(model, EncoderDecoder):
        return _filled(model, tokenizer, prompts, sampling, window)
    return _continued(model, tokenizer, prompts, sampling, window)


def answer(
    model: Model, tokenizer: data.Tokenizer, messages: data.Messages, sampling: Sampling
) -> str:
    """Returns a sampled answer to a dialogue, without the dialogue.

    Args:
        model: Decoder.
        tokenizer: Tokenizer of the model, with its chat template (``data.chat_prompt``).
        messages: Messages with ``role`` and ``content``.
        sampling: Sampling settings; any end token of the tokenizer ends the answer.

    Raises:
        ConfigError: If the model cannot generate text, or the template rejects the messages.
    """
    check_can_generate(model.config)
    if not isinstance(model, Decoder):
        raise ConfigError("an encoder-decoder fills blanks and answers no dialogue: use generate")
    prompt = tokenizer.encode(data.chat_prompt(tokenizer, messages)).tolist()
    sampling = dataclasses.replace(sampling, eos_id=data.end_ids(tokenizer))
    (added,) = decoding.generate(model, [[tokenizer.bos_id, *prompt]], sampling)
    return _decoded(tokenizer, added)


def _continued(
    model: Decoder,
    tokenizer: data.Tokenizer,
    prompts: list[str],
    sampling: Sampling,
    window: int | None,
) -> list[str]:
    rows = [[tokenizer.bos_id, *tokenizer.encode(prompt).tolist()] for prompt in prompts]
    added = decoding.generate(model, [row[-(window or 0) :] for row in rows], sampling)
    whole = [(*row[1:], *more) for row, more in zip(rows, added, strict=True)]
    return [_decoded(tokenizer, row) for row in whole]


def _decoded(tokenizer: data.Tokenizer, ids: Sequence[int]) -> str:
    """Returns the text of tokens, without end tokens."""
    ends = data.end_ids(tokenizer)
    return tokenizer.decode(np.array([each for each in ids if each not in ends], np.int32))


def _filled(
    model: EncoderDecoder,
    tokenizer: data.Tokenizer,
    prompts: list[str],
    sampling: Sampling,
    window: int | None,
) -> list[str]:
    if not isinstance(tokenizer, MarksBlanks):
        raise ConfigError(
            "the tokenizer of this encoder-decoder has no sentinels for the blanks of a text: pass "
            "token ids instead of texts"
        )
    most = None if window is None else window - 1
    rows = [tokenizer.encode_blanks(prompt).tolist()[:most] for prompt in prompts]
    sources = [[*row, tokenizer.eos_id] for row in rows]
    found = decoding.translate(model, sources, sampling, start_id=tokenizer.pad_id)
    return [_decoded(tokenizer, row) for row in found]
