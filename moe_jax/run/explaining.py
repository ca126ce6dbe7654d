"""Explains one text under the model of a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from moe_jax import data, decoding
from moe_jax.analysis.explain import Explanation, measure, require_explainable
from moe_jax.analysis.forward import Batch
from moe_jax.errors import ConfigError
from moe_jax.models import EncoderDecoder, EncoderDecoderConfig, ModelConfig
from moe_jax.run.best import Step
from moe_jax.run.opened import FolderModel, open_folder
from moe_jax.run.sampling import MarksBlanks, check_can_generate

_MOST_ANSWERED = 32


def explain(
    folder: str | Path,
    prompt: str | Sequence[int],
    *,
    target: str | Sequence[int] | None = None,
    step: Step = None,
    batch_size: int = 16,
) -> Explanation:
    """Explains the routing of one text: experts, gates, contributions and causal effects.

    The effect of an expert is the change of the next token's log-likelihood if the expert is
    removed from one token in one layer, computed by a forward pass of its own. A decoder reads the
    begin token before a text. No token is dropped.

    Args:
        folder: Folder of a run, of a converted model, or of a model of ``transformers``.
        prompt: Text, or token ids, which are read as they are.
        target: Text or token ids that the decoder of an encoder-decoder writes; ``None`` for its
            most probable answer. A decoder has no target.
        step: Step of the checkpoint of a run, or ``best``; ``None`` for the newest intact one.
        batch_size: Number of forward passes that are computed at once.

    Raises:
        ConfigError: If ``require_explainable`` rejects the model, the folder holds none, or the
            prompt is empty or longer than the model reads at once.

    Examples:
        >>> import moe_jax as mj
        >>> found = mj.explain("tiny-mixtral", [5, 7, 3])
        >>> (layer,) = found.layers
        >>> layer.experts.shape, layer.effects.shape  # 3 tokens, 2 experts each
        ((3, 2), (3, 2))
        >>> layer.error < 1e-5  # the contributions sum to the layer's output
        True
    """
    texts = isinstance(prompt, str) or isinstance(target, str)

    def check(config: ModelConfig) -> None:
        require_explainable(config)
        if target is not None and not isinstance(config, EncoderDecoderConfig):
            raise ConfigError("a decoder continues its prompt and has no target: leave it out")
        for text in (prompt, target):
            if text is not None and not isinstance(text, str) and not len(text):
                raise ConfigError("the text is empty: give at least one token")

    opened = open_folder(folder, step, check, texts=texts)
    with opened.on_mesh():
        batch = _batch(opened, prompt, target)
        found = measure(opened.model, batch, batch_size=batch_size)
    source = np.asarray(batch["encoder_inputs"])[0] if "encoder_inputs" in batch else ()
    return Explanation(
        _pieces(opened, np.asarray(batch["inputs"])[0]),
        _pieces(opened, source),
        _pieces(opened, found.next_ids),
        found.log_likelihoods,
        found.layers,
    )


def _batch(
    opened: FolderModel, prompt: str | Sequence[int], target: str | Sequence[int] | None
) -> Batch:
    """Returns the fields of ``moe_jax.analysis.forward`` for one text."""
    if not isinstance(opened.model, EncoderDecoder):
        return _fields(_checked(opened, _ids(opened, prompt, begins=True)))
    source = _checked(opened, _source(opened, prompt))
    answer = _answer(opened, source) if target is None else _ids(opened, target, begins=False)
    inputs = _checked(opened, [opened.start_id, *answer])
    tokens = jnp.asarray([source], jnp.int32)
    return {
        **_fields(inputs),
        "encoder_inputs": tokens,
        "encoder_segments": jnp.ones_like(tokens),
    }


def _fields(ids: list[int]) -> dict[str, jnp.ndarray]:
    tokens = jnp.asarray([ids], jnp.int32)
    positions = jnp.arange(len(ids), dtype=jnp.int32)[None]
    return {"inputs": tokens, "segments": jnp.ones_like(tokens), "positions": positions}


def _ids(opened: FolderModel, text: str | Sequence[int], *, begins: bool) -> list[int]:
    if not isinstance(text, str):
        return [int(token) for token in text]
    assert opened.tokenizer is not None  # ``open_folder`` has checked it.
    ids = opened.tokenizer.encode(text).tolist()
    return [opened.tokenizer.bos_id, *ids] if begins else ids


def _source(opened: FolderModel, prompt: str | Sequence[int]) -> list[int]:
    """Returns what the encoder reads: a text with its blanks, then the end token."""
    if not isinstance(prompt, str):
        return _ids(opened, prompt, begins=False)
    tokenizer = opened.tokenizer
    assert tokenizer is not None  # ``open_folder`` has checked it.
    if isinstance(tokenizer, MarksBlanks):
        return [*tokenizer.encode_blanks(prompt).tolist(), tokenizer.eos_id]
    return [*tokenizer.encode(prompt).tolist(), tokenizer.eos_id]


def _answer(opened: FolderModel, source: list[int]) -> list[int]:
    """Returns the most probable answer of an encoder-decoder, token by token, without its end."""
    assert isinstance(opened.model, EncoderDecoder)
    try:
        check_can_generate(opened.model.config)
    except ConfigError as error:
        raise ConfigError(f"{error}; or give the target of the text (--target)") from error
    ends = () if opened.tokenizer is None else data.end_ids(opened.tokenizer)
    sampling = decoding.Sampling(min(_MOST_ANSWERED, opened.window - 1), 0.0, eos_id=ends)
    (found,) = decoding.translate(opened.model, [source], sampling, opened.start_id)
    return [token for token in found if token not in ends]


def _checked(opened: FolderModel, ids: list[int]) -> list[int]:
    """Returns the token ids, which the model has to know and to read at once."""
    if not ids:
        raise ConfigError("the text is empty: give at least one token")
    if len(ids) > opened.window:
        raise ConfigError(
            f"the text has {len(ids)} tokens, and an explanation has at most {opened.window}: "
            "shorten it"
        )
    opened.model.config.check_length(len(ids), "the text's length")
    wrong = [token for token in ids if not 0 <= token < opened.vocab_size]
    if wrong:
        raise ConfigError(f"token id {wrong[0]} is not below {opened.vocab_size}, the vocabulary")
    return ids


def _pieces(opened: FolderModel, ids: Sequence[int] | np.ndarray) -> tuple[str, ...]:
    tokenizer = opened.tokenizer
    return tuple(str(t) if tokenizer is None else tokenizer.piece(int(t)) for t in ids)
