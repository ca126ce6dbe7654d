"""Reads the documents of a corpus as the texts of a model: one text, or a source and a target."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moe_jax import data
from moe_jax.analysis.texts import Text
from moe_jax.data.sentinels import WithSentinels
from moe_jax.data.spare import without_spare_ids
from moe_jax.models import EncoderDecoder
from moe_jax.run.opened import FolderModel


def read(
    opened: FolderModel, groups: Sequence[data.Source], documents: int, length: int
) -> tuple[list[Text], np.ndarray, np.ndarray]:
    """Returns the texts of a corpus.

    A decoder or an encoder reads the begin token and the first tokens of a document. An
    encoder-decoder whose tokenizer has sentinels fills blanks: the spans of span corruption at the
    rates of T5, drawn by the number of the document. Any other encoder-decoder reads the first half
    of the tokens, and its target is the second half.

    Args:
        opened: Model and tokenizer.
        groups: Documents of each group.
        documents: Largest number of documents per group.
        length: Largest number of tokens of a document.

    Returns:
        The texts; the group ``(documents,)`` of each; and the number ``(documents,)`` of UTF-8
        bytes of the text whose likelihood the model gives.
    """
    tokenizer = opened.tokenizer
    assert tokenizer is not None  # A model that reads texts has one.
    texts: list[Text] = []
    labels: list[int] = []
    sizes: list[int] = []
    for group, found in enumerate(groups):
        for index in range(min(documents, len(found))):
            ids = tokenizer.encode(found[index])[: length - 1]
            if isinstance(opened.model, EncoderDecoder):
                text, likely = pair_of(tokenizer, ids, len(texts), opened.start_id)
            else:
                text, likely = Text([tokenizer.bos_id, *ids.tolist()]), ids
            texts.append(text)
            labels.append(group)
            sizes.append(int(tokenizer.byte_lengths[likely].sum()))
    return texts, np.array(labels), np.array(sizes)


def pair_of(
    tokenizer: data.Tokenizer, ids: np.ndarray, number: int, start_id: int
) -> tuple[Text, np.ndarray]:
    """Returns the source and the target of an encoder-decoder for one text; see ``read``.

    Args:
        tokenizer: Tokenizer of the model.
        ids: Token ids ``(L,)`` of the text.
        number: Number of the text, which draws its blanks.
        start_id: First input of the decoder.

    Returns:
        The text that the two stacks read, and the token ids whose likelihood the model gives.
    """
    marked, end = without_spare_ids(tokenizer), tokenizer.eos_id
    if isinstance(marked, WithSentinels) and len(ids) > 1:
        corruption = data.SpanCorruption(
            sentinels=marked.sentinels,
            vocab_size=marked.vocab_size,
            eos_id=end,
            pad_id=tokenizer.pad_id,
        )
        mask = corruption.random_spans_noise_mask(len(ids), np.random.default_rng(number))
        source, target = corruption.corrupt(ids, mask)
        return Text([start_id, *target[:-1].tolist()], source.tolist()), ids[mask]
    first, second = np.split(ids, [(len(ids) + 1) // 2])
    return Text([start_id, *second.tolist()], [*first.tolist(), end]), second
