"""Makes the routing table of the model of a folder, and measures the loss in quality."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax import data
from moe_jax.analysis.observed import Observed, observe
from moe_jax.analysis.routing_table import RoutingTable, agreement, install, table_of
from moe_jax.analysis.texts import Text
from moe_jax.errors import ConfigError
from moe_jax.models import Decoder, ModelConfig
from moe_jax.routing.tabulated import tabulated
from moe_jax.run.analyzing import require_analysable
from moe_jax.run.best import Step
from moe_jax.run.opened import FolderModel, check_folder, open_folder
from moe_jax.run.scoring import require_causal


def tabulate(
    folder: str | Path,
    source: str,
    output: Path,
    *,
    step: Step = None,
    documents: int = 512,
    held_out: int = 64,
    length: int = 256,
    least: int = 8,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Writes the routing table of a corpus and measures it on documents that it did not read.

    Args:
        folder: Folder of a run, of a converted model, or of a model of ``transformers``.
        source: Data source; its training part makes the table, its validation part measures it.
        output: File to write.
        step: Step of the checkpoint of a run, or ``best``; ``None`` for the newest intact one.
        documents: Largest number of documents for the table.
        held_out: Largest number of documents for the measurement.
        length: Largest number of tokens per document.
        least: Smallest number of occurrences of a token in the table.
        batch_size: Number of documents that are read at once.

    Returns:
        Number of tokens that made the table and that measured it, number of ids in the table,
        share of the measured tokens in the table, agreement of each layer, and mean loss in nats
        per token with the router and with the table.

    Raises:
        ConfigError: If the model has no router that can read a table, or the source no document.
    """
    check_folder(folder, require_tabulable)
    # A streamed source is read no further than that; others are on this machine.
    config = data.DataConfig(source=source)
    if source.startswith("hf:"):
        config = dataclasses.replace(config, train_documents=documents, eval_documents=held_out)
    try:
        data.check_source(config)
        parts = data.open_source(config, "train"), data.open_source(config, "eval")
    except FileNotFoundError as error:
        raise ConfigError(f"--corpus: {error}") from error
    opened = open_folder(folder, step, require_tabulable)
    opened.model.config.check_length(length, "--length")
    corpus = _rows(opened, parts[0], documents, length)
    unseen = _rows(opened, parts[1], held_out, length)
    seen = _observed(opened, corpus, batch_size)
    table = table_of(seen, opened.vocab_size, least)
    table.save(output)
    before = _observed(opened, unseen, batch_size)
    assert isinstance(opened.model, Decoder)  # ``require_tabulable`` has checked it.
    install(opened.model, table)
    after = _observed(opened, unseen, batch_size)
    return {
        "corpus_tokens": len(seen.tokens),
        "table_ids": int(table.known.sum()),
        **compared(before, after, table),
    }


def compared(before: Observed, after: Observed, table: RoutingTable) -> dict[str, Any]:
    """Returns coverage, agreement and losses of the same tokens without and with a table."""
    covered = table.known[before.tokens]
    losses = [float(np.nanmean(one.losses)) for one in (before, after)]
    return {
        "tokens": len(before.tokens),
        "covered": float(covered.mean()),
        "agreement": agreement(before, table),
        "loss": losses[0],
        "loss_with_table": losses[1],
        "loss_increase": losses[1] - losses[0],
    }


def require_tabulable(config: ModelConfig) -> None:
    """Rejects models whose routers can read no table.

    Raises:
        ConfigError: If so.
    """
    require_causal(config)
    require_analysable(config)
    for layer in config.sparse_layers():
        tabulated(layer.moe.router)


def _observed(opened: FolderModel, rows: Sequence[list[int]], batch_size: int) -> Observed:
    assert isinstance(opened.model, Decoder)  # ``require_tabulable`` has checked it.
    with opened.on_mesh():
        (found,) = observe(opened.model, [Text(row) for row in rows], batch_size)
    return found


def _rows(opened: FolderModel, texts: data.Source, documents: int, length: int) -> list[list[int]]:
    """Returns the first token ids of the first documents, after the begin token."""
    tokenizer = opened.tokenizer
    assert tokenizer is not None  # A model that reads texts has one.
    number = min(documents, len(texts))
    if not number:
        raise ConfigError("--corpus holds no document: give a source with text")
    rows = [[tokenizer.bos_id, *tokenizer.encode(texts[i]).tolist()] for i in range(number)]
    return [row[:length] for row in rows]
