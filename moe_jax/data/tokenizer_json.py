"""Writes a tokenizer of this package as a ``tokenizer.json``, which ``transformers`` loads."""

from __future__ import annotations

import json
from typing import Any

import sentencepiece as spm

from moe_jax.data.sentinels import WithSentinels
from moe_jax.data.spare import without_spare_ids
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.data.tokenizers import ESCAPE, ESCAPES, NEWLINE, SPACE, Bytes, SentencePiece

Json = dict[str, Any]
_SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """Returns the texts of ``tokenizer.json`` and ``tokenizer_config.json``, by name of the file.

    The files give the ids of ``tokenizer.encode``, after the begin token with which every document
    of a run starts. A special token that is written in a text is read as this token, as
    ``transformers`` does, and not as its characters.

    Args:
        tokenizer: Tokenizer of a run.

    Returns:
        No file for a released tokenizer, whose files a run copies.
    """
    outer = without_spare_ids(tokenizer)
    base = outer.base if isinstance(outer, WithSentinels) else outer
    if isinstance(base, Bytes):
        parts, num_specials = _bytes(), 3
    elif isinstance(base, SentencePiece):
        parts, num_specials = _sentencepiece(base), 4
    else:
        return {}
    added = dict(enumerate(_SPECIALS[:num_specials]))
    added |= {i: outer.piece(i) for i in range(base.vocab_size, outer.vocab_size)}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(i, piece) for i, piece in added.items()],
        "post_processor": _begins(base.bos_id),
        **parts,
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": _SPECIALS[base.pad_id],
        "bos_token": _SPECIALS[base.bos_id],
        "eos_token": _SPECIALS[base.eos_id],
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": json.dumps(content, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(settings, indent=2),
    }


def _added(number: int, piece: str) -> Json:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": piece, "special": True, **plain}


def _begins(bos: int) -> Json:
    """Returns the step that puts the begin token before a text."""
    begin = _SPECIALS[bos]
    one = {"SpecialToken": {"id": begin, "type_id": 0}}
    text = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    tokens = {begin: {"id": begin, "ids": [bos], "tokens": [begin]}}
    return {
        "type": "TemplateProcessing",
        "single": [one, text[0]],
        "pair": [one, *text],
        "special_tokens": tokens,
    }


def _bytes() -> Json:
    """Returns the parts for one token per byte: ``tokenizers`` shows each byte as a character."""
    specials = {piece: i for i, piece in enumerate(_SPECIALS[:3])}
    vocabulary = specials | {character: byte + 3 for byte, character in enumerate(_characters())}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    level["use_regex"] = False
    return {
        "normalizer": None,
        "pre_tokenizer": level,
        "decoder": level,
        "model": _bpe(vocabulary, [], byte_fallback=False),
    }


def _characters() -> list[str]:
    """Returns the character of each byte in GPT-2's byte-level alphabet.

    A printable byte is its own Latin-1 character; the others follow from U+0100, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _sentencepiece(base: SentencePiece) -> Json:
    processor = spm.SentencePieceProcessor(model_proto=base.model)
    pieces = [processor.id_to_piece(i) for i in range(base.vocab_size)]
    escape = {character: ESCAPE + letter for character, letter in ESCAPES.items()}
    written = escape | {"\n": NEWLINE, " ": SPACE}
    # The escape itself is restored last, so that no restored text is taken for an escape.
    restored = {SPACE: " ", NEWLINE: "\n"}
    unescaped = {escape[c]: c for c in (NEWLINE, SPACE, ESCAPE)}
    return {
        "normalizer": {"type": "Sequence", "normalizers": _replaced(written)},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                *_replaced(restored),
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *_replaced(unescaped),
            ],
        },
        "model": _bpe(
            {piece: i for i, piece in enumerate(pieces)},
            _merges(pieces, [processor.get_score(i) for i in range(len(pieces))]),
            byte_fallback=True,
        ),
    }


def _replaced(texts: dict[str, str]) -> list[Json]:
    return [
        {"type": "Replace", "pattern": {"String": old}, "content": new}
        for old, new in texts.items()
    ]


def _merges(pieces: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """Returns the pairs that SentencePiece merges, in its order: by the score of the result."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    pairs = (
        (-scores[i], ids[piece[:cut]], ids[piece[cut:]], piece, cut)
        for i, piece in enumerate(pieces)
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    )
    return [(piece[:cut], piece[cut:]) for *_, piece, cut in sorted(pairs)]


def _bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]], byte_fallback: bool) -> Json:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": "<unk>" if "<unk>" in vocabulary else None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": byte_fallback,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": merges,
    }
