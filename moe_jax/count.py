"""Counts a model: ``python -m moe_jax.count --config=configs/quickstart.py``; one JSON line."""

from __future__ import annotations

import dataclasses
import json

from moe_jax import cli, data
from moe_jax.planning import count

_CONFIG = cli.define_config()


def main() -> None:
    """Prints total and active parameters, and FLOPs per token by part."""
    experiment = cli.experiment_of(_CONFIG)
    vocab = data.Bytes().vocab_size if experiment.data.tokenizer == "bytes" else None
    vocab = vocab or experiment.data.vocab_size
    cost = count(experiment.model, vocab, experiment.data.seq_length)
    training = {"training_flops_per_token": cost.training_flops_per_token}
    print(json.dumps({"name": experiment.name, **dataclasses.asdict(cost), **training}))


if __name__ == "__main__":
    cli.run(main)
