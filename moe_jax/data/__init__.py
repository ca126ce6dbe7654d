"""Corpora, tokenizers, batches and baselines."""

from moe_jax.data.baselines import baselines, best_possible_loss
from moe_jax.data.bpe import check_bpe, train_bpe
from moe_jax.data.config import BLEND, BlendConfig, DataConfig, MixtureConfig, PartConfig
from moe_jax.data.dialogues import Messages, chat_prompt, check_dialogues
from moe_jax.data.loader import Batch, eval_batches, measure_throughput, train_batches
from moe_jax.data.mixture import MarkovLanguages, MixtureSource, make_mixture
from moe_jax.data.rows import prepare_rows
from moe_jax.data.sentinels import WithSentinels
from moe_jax.data.source import Source
from moe_jax.data.sources import (
    Contents,
    check_source,
    empty_files,
    open_source,
    read_contents,
)
from moe_jax.data.span_corruption import SpanCorruption, Spans
from moe_jax.data.spare import WithSpareIds, with_spare_ids
from moe_jax.data.tokenizer import end_ids
from moe_jax.data.tokenizer_json import tokenizer_files
from moe_jax.data.tokenizers import (
    Bytes,
    SentencePiece,
    Tokenizer,
    check_tokenizer,
    contradiction,
    load_tokenizer,
    open_tokenizer,
    same_tokenizer,
    texts,
    train_sentencepiece,
)

__all__ = [
    "BLEND",
    "BlendConfig",
    "PartConfig",
    "Batch",
    "Bytes",
    "Contents",
    "DataConfig",
    "MarkovLanguages",
    "Messages",
    "MixtureConfig",
    "MixtureSource",
    "SentencePiece",
    "Source",
    "SpanCorruption",
    "Spans",
    "Tokenizer",
    "WithSentinels",
    "WithSpareIds",
    "baselines",
    "best_possible_loss",
    "chat_prompt",
    "check_bpe",
    "check_dialogues",
    "check_source",
    "check_tokenizer",
    "contradiction",
    "empty_files",
    "end_ids",
    "eval_batches",
    "load_tokenizer",
    "make_mixture",
    "measure_throughput",
    "open_source",
    "open_tokenizer",
    "prepare_rows",
    "read_contents",
    "same_tokenizer",
    "texts",
    "train_batches",
    "tokenizer_files",
    "train_bpe",
    "train_sentencepiece",
    "with_spare_ids",
]
