"""Traces a decoder and an encoder-decoder with all annotations of ``moe_jax.models`` checked.

The annotations are checked where functions are called, which includes tracing, so nothing is
compiled. The import hook works on modules that are not imported yet: ``test_shapes.py`` runs this
file in a process of its own.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import typing

import jax
import jax.numpy as jnp
import jaxtyping

CHECKED = "moe_jax.models"

with jaxtyping.install_import_hook(CHECKED, "beartype.beartype"):
    from moe_jax import models

from moe_jax.nn.mode import TRAIN  # noqa: E402
from moe_jax.nn.moe_config import MoEConfig  # noqa: E402
from moe_jax.routing import presets  # noqa: E402

B, L, T, V, K = 2, 6, 4, 11, 2
MOE = MoEConfig(num_experts=4, expert_dim=8, every=2, router=presets.mixtral(k=K))
SIZES = {"width": 8, "num_heads": 2, "head_dim": 4, "mlp_dim": 8, "compute_dtype": "bfloat16"}
DECODER = models.DecoderConfig(num_layers=4, moe=MOE, lookahead=2, **SIZES)
# The encoder's layers are scanned; the decoder's layers differ, and run one by one.
ENCODER_DECODER = models.EncoderDecoderConfig(
    encoder_layers=4, decoder_layers=2, encoder_moe=MOE, decoder_moe=MOE, **SIZES
)


def batch(layers: int) -> dict[str, typing.Any]:
    """Returns a batch of ones that forces the routing of ``layers`` MoE layers."""
    names = ("inputs", "targets", "segments", "positions")
    arrays = {name: jnp.ones((B, L), jnp.int32) for name in names}
    encoder = {name: jnp.ones((B, L), jnp.int32) for name in ("encoder_inputs", "encoder_segments")}
    return arrays | encoder | {"routing": (jnp.zeros((B, L, K), jnp.int32),) * layers}


def read(config: models.ModelConfig) -> jax.Array:
    """Trains on a batch, updates the routers, and returns a value that depends on the output."""
    model = models.make(config, V, jax.random.key(0))
    layers = len(config.sparse_layers())
    tokens = batch(layers)
    reading = model.read(tokens, mode=TRAIN, rng=jax.random.key(1))
    assert len(model.routed(tokens)) == len(reading.reports) == layers
    model.update_routers([aux.counts for aux in reading.reports])
    return sum(model.logits(x).sum() for x in (reading.hidden, *reading.ahead))


def extend_decoder() -> jax.Array:
    """Reads tokens with a cache."""
    model = models.make(DECODER, V, jax.random.key(0))
    tokens = jnp.ones((B, T), jnp.int32)
    hidden, cache = model.extend(tokens, tokens, tokens, model.empty_cache(B, L))
    return hidden.sum() + cache.used


def extend_encoder_decoder() -> jax.Array:
    """Reads target tokens with a cache, behind an encoder."""
    model = models.make(ENCODER_DECODER, V, jax.random.key(0))
    tokens, segments = jnp.ones((B, 1), jnp.int32), jnp.ones((B, T), jnp.int32)
    memory, _ = model.encode(segments, segments)
    cache = model.empty_cache(B, L)
    for each in (memory, None):
        hidden, cache = model.extend(tokens, tokens, tokens, cache, segments, memory=each)
    return hidden.sum() + cache.used


def rejects_an_untrue_shape() -> bool:
    """Returns True if tokens without a batch axis are rejected, as a self-test."""
    try:
        models.make(DECODER, V, jax.random.key(0)).hidden(*[jnp.ones(L, jnp.int32)] * 3)
    except jaxtyping.TypeCheckError:
        return True
    return False


def evaluate_annotations() -> int:
    """Returns the number of functions and classes whose annotations are names that exist.

    Beartype accepts every value for an annotation that it cannot evaluate.
    """
    count = 0
    for module in [name for name in sys.modules if name.startswith(CHECKED)]:
        members = [each for each in vars(sys.modules[module]).values() if callable(each)]
        local = [each for each in members if getattr(each, "__module__", "") == module]
        # The ``__init__`` of a dataclass has annotations of names in the modules of its bases.
        parts = [each for each in local if not dataclasses.is_dataclass(each)]
        methods = [each for part in parts for each in getattr(part, "__dict__", {}).values()]
        for each in (*local, *filter(inspect.isfunction, methods)):
            typing.get_type_hints(each)
            count += 1
    return count


def main() -> None:
    """Raises ``jaxtyping.TypeCheckError`` if an annotation is untrue."""
    for config in (DECODER, ENCODER_DECODER):
        jax.eval_shape(lambda config=config: read(config))
    jax.eval_shape(extend_decoder)
    jax.eval_shape(extend_encoder_decoder)
    rejected: list[bool] = []
    jax.eval_shape(lambda: rejected.append(rejects_an_untrue_shape()))
    assert rejected == [True], "the hook checks nothing"
    count = evaluate_annotations()
    assert count > 50, count
    print(f"both models and {count} functions and classes have true annotations")


if __name__ == "__main__":
    main()
