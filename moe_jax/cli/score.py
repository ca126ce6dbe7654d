"""Scores texts, one JSON line per document: ``moe-jax score --model=DIR --file=texts.jsonl``.

The model is a run, a converted model or a model of transformers. A line has the log-likelihood of
the document in nats, its bits per byte, and the log-likelihood of every token given the tokens
before it. No token is dropped.
"""

from __future__ import annotations

import json
from pathlib import Path

from absl import flags

from moe_jax.cli import common
from moe_jax.data.documents import read_documents
from moe_jax.run.scoring import check_overlap, open_model, scores


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("model", None, "Folder of the model.", required=True, flag_values=values)
    flags.DEFINE_string(
        "file",
        None,
        "Text file, which is one document, or .jsonl file with one document in each line.",
        required=True,
        flag_values=values,
    )
    flags.DEFINE_string(
        "field", "text", "Field of a line of a .jsonl file with the text.", flag_values=values
    )
    common.define_step(values)
    common.define_average(values)
    common.define_routing_table(values)
    flags.DEFINE_integer(
        "window",
        0,
        "Number of tokens that the model reads at once; 0 for data.seq_length of a run, and 1024 "
        "for other models.",
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "overlap",
        0,
        "Number of tokens that a later window of a document reads again as context.",
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_integer(
        "batch_size",
        8,
        "Number of windows that are computed at once.",
        lower_bound=1,
        flag_values=values,
    )


def main(given: flags.FlagValues) -> None:
    """Prints one JSON line for each document."""
    if given.window:
        check_overlap(given.window, given.overlap)
    for _ in read_documents(Path(given.file), given.field):
        pass  # A wrong line is found before the weights are loaded.
    table = given.routing_table
    found = scores(
        open_model(given.model, given.step, average=given.average, routing_table=table),
        read_documents(Path(given.file), given.field),
        window=given.window,
        overlap=given.overlap,
        batch_size=given.batch_size,
    )
    for number, score in enumerate(found):
        line = {
            "document": number,
            "tokens": len(score.tokens),
            "bytes": score.size,
            "log_likelihood": score.log_likelihood,
            "bits_per_byte": score.bits_per_byte,
            "token_ids": score.tokens,
            "token_log_likelihoods": score.log_likelihoods,
        }
        common.say(json.dumps(line))


if __name__ == "__main__":
    common.run(define, main)
