"""Measures the tokens per second of greedy decoding with and without a cache.

``python -m tools.decode_speed`` compiles both decoders for the quickstart model with random weights
and for the same model with latent attention. It runs them alternately and writes ``decoding.json``:
median speeds, and the median over rounds of their ratio. Without a cache, each token needs a pass
over all positions.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from moe_jax.configs import quickstart

from moe_jax.cli import common
from moe_jax.config.experiment import Experiment
from moe_jax.config.schema import build
from moe_jax.decoding import Sampling, generate
from moe_jax.files import write_json
from moe_jax.models import Decoder
from moe_jax.nn.latent import Latent
from moe_jax.nn.mode import DECODE

VOCAB, ROWS, PROMPT, ADDED = 2048, 4, 64, 64
_PROMPTS = np.random.default_rng(0).integers(3, VOCAB, (ROWS, PROMPT)).tolist()


def cached(model: Decoder) -> list[list[int]]:
    """Decodes with the cache."""
    return generate(model, _PROMPTS, Sampling(ADDED, temperature=0.0))


@jax.jit
def _without(model: Decoder) -> jax.Array:
    length = PROMPT + ADDED
    tokens = jnp.zeros((ROWS, length), jnp.int32).at[:, :PROMPT].set(jnp.asarray(_PROMPTS))
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)

    def one(i: int, tokens: jax.Array) -> jax.Array:
        segments = (positions < i).astype(jnp.int32)
        hidden, _ = model.hidden(tokens, segments, positions, mode=DECODE)
        last = jax.lax.dynamic_slice_in_dim(hidden, i - 1, 1, axis=1)
        return tokens.at[:, i].set(model.logits(last)[:, 0].argmax(-1).astype(jnp.int32))

    return jax.lax.fori_loop(PROMPT, length, one, tokens)[:, PROMPT:]


def uncached(model: Decoder) -> list[list[int]]:
    """Decodes without a cache."""
    return np.asarray(_without(model)).tolist()


def seconds(run: Callable[[], object]) -> float:
    """Returns the duration of one call in seconds."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def measure(model: Decoder, rounds: int) -> dict[str, float]:
    """Returns tokens per second and their ratio.

    Raises:
        RuntimeError: The two decoders give different tokens.
    """
    if cached(model) != uncached(model):
        raise RuntimeError("decoding with a cache and without a cache give different tokens")
    times = [
        (seconds(lambda: cached(model)), seconds(lambda: uncached(model))) for _ in range(rounds)
    ]
    tokens = ROWS * ADDED
    return {
        "cached_tokens_per_second": tokens / statistics.median(t for t, _ in times),
        "uncached_tokens_per_second": tokens / statistics.median(t for _, t in times),
        "ratio": statistics.median(without / using for using, without in times),
    }


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string(
        "output", "experiments/results/decoding.json", "File of the result.", flag_values=values
    )
    flags.DEFINE_integer("rounds", 7, "Number of rounds.", lower_bound=1, flag_values=values)


def main(given: flags.FlagValues) -> None:
    """Measures both models and writes the result."""
    config = build(Experiment, quickstart.get_config()).model
    sizes = Latent(query_rank=64, kv_rank=32, plain_dim=32, rotary_dim=16, value_dim=32)
    kinds = {"quickstart": config, "latent": dataclasses.replace(config, attention=sizes)}
    speeds = {
        name: measure(Decoder(kind, VOCAB, jax.random.key(0)), given.rounds)
        for name, kind in kinds.items()
    }
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    shape = {"rows": ROWS, "prompt": PROMPT, "added": ADDED}
    write_json(Path(given.output), {"device": device, **shape, **speeds})


if __name__ == "__main__":
    common.run(define, main)
