"""Runs models of every kind once with all annotations of ``moe_jax.nn`` checked.

The annotations are checked where functions are called and dataclasses are created, which includes
tracing, so nothing is compiled. The import hook works on modules that are not imported yet:
``test_shapes.py`` runs this file in a process of its own.
"""

from __future__ import annotations

import inspect
import sys
import typing

import jax
import jax.numpy as jnp
import jaxtyping

with jaxtyping.install_import_hook(["moe_jax.attend", "moe_jax.nn"], "beartype.beartype"):
    from moe_jax.attend import View
    from moe_jax.models import DecoderConfig, EncoderDecoderConfig
    from moe_jax.models.decoder import Decoder
    from moe_jax.models.encoder_decoder import EncoderDecoder
    from moe_jax.nn.attention import Details
    from moe_jax.nn.attention_experts import AttentionExpertsConfig
    from moe_jax.nn.feed_forward import FeedForward, FeedForwardConfig
    from moe_jax.nn.latent import Latent
    from moe_jax.nn.layer import MoE
    from moe_jax.nn.mode import TRAIN, Mode
    from moe_jax.nn.moe_config import MoEConfig
    from moe_jax.nn.norm import NormConfig
    from moe_jax.nn.positions import Learned, Rotary, Sinusoidal, T5Relative, YarnScaling
    from moe_jax.nn.shared import SharedConfig

from flax import nnx

from moe_jax import routing

# Batch, length, vocabulary.
B, L, V = 2, 6, 32
KEY = jax.random.key(0)
NETWORK = FeedForwardConfig(4, 8)
EVERY_DETAIL = Details(
    qkv_bias=True,
    output_bias=True,
    qk_norm="head",
    clip=8.0,
    sinks=True,
    window=4,
    chunk=4,
    temperature=0.1,
)
EVERY_MASK = {"expert_dropout": 0.1, "expert_mask": 0.1, "final_mask": 0.1}
SWITCH = MoEConfig(every=1, num_experts=4, group_size=4, shared=SharedConfig(8))


def decoder(**settings: object) -> DecoderConfig:
    """Returns a decoder with two layers, which are scanned, and the given settings."""
    small = {"width": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "mlp_dim": 8}
    return DecoderConfig(**{**small, "num_layers": 2, "moe": SWITCH, **settings})


def moe(**settings: object) -> DecoderConfig:
    """Returns a decoder whose MoE layer has the given settings."""
    return decoder(moe=MoEConfig(**{"every": 1, "num_experts": 4, "group_size": 8, **settings}))


DECODERS = {
    "plain": decoder(),
    "dense": decoder(moe=MoEConfig(every=0), positions=Learned(16), gated=True),
    "details": decoder(attention=EVERY_DETAIL, mlp_bias=True, norm=NormConfig("layer", bias=True)),
    "width norm": decoder(attention=Details(qk_norm="width", scale=1.0), compute_dtype="bfloat16"),
    "unit norm": decoder(attention=Details(qk_norm="unit"), positions=Rotary(interleaved=True)),
    "latent": decoder(attention=Latent(8, 8, 4, 4, 4), num_kv_heads=0, scan_layers=False),
    "scaled": decoder(positions=Rotary(scaling=YarnScaling(2.0))),
    "sinusoidal": decoder(positions=Sinusoidal()),
    "relative": decoder(positions=T5Relative(8, 16)),
    "attention experts": decoder(attention_experts=AttentionExpertsConfig(1, num_experts=2)),
    "masks": moe(shared=SharedConfig(8, "conditional", 0.1), **EVERY_MASK),
    "sequence losses": moe(router=routing.preset("deepseek_v3"), num_experts=16),
    "soft": moe(router=routing.preset("soft_moe"), allow_future_leak=True),
    "widths": moe(expert_dims=(4, 8), shared=SharedConfig(8, "softmax"), extra_dense="before"),
}


def batch() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns token ids, segments and positions ``(B, L)``; the last token is padding."""
    positions = jnp.arange(L, dtype=jnp.int32) + jnp.zeros((B, 1), jnp.int32)
    return positions, (positions < L - 1).astype(jnp.int32), positions


def read(config: DecoderConfig, key: jax.Array) -> None:
    """Runs a decoder in training with its routing recorded, and then with a cache."""
    model = Decoder(config, V, key)
    inputs, segments, positions = batch()
    mode = Mode("train", record=True)
    model.hidden(inputs, segments, positions, mode=mode, rng=key)
    model.extend(inputs, segments, positions, model.empty_cache(B, 2 * L))


def read_pairs(key: jax.Array) -> None:
    """Runs an encoder-decoder with cross-attention in training."""
    small = {"width": 16, "num_heads": 4, "head_dim": 4, "mlp_dim": 8}
    model = EncoderDecoder(EncoderDecoderConfig(**small, positions=T5Relative(8, 16)), V, key)
    inputs, segments, positions = batch()
    batch_of_pairs = {
        "encoder_inputs": inputs,
        "encoder_segments": segments,
        "inputs": inputs,
        "segments": segments,
        "positions": positions,
    }
    model.read(batch_of_pairs, mode=TRAIN, rng=key)
    cache = model.empty_cache(B, 2 * L)
    memory, _ = model.encode(inputs, segments)
    _, cache = model.extend(inputs, segments, positions, cache, segments, memory=memory)
    model.extend(inputs, segments, positions + L, cache, segments)


def layer(key: jax.Array) -> jax.Array:
    """Returns the output of the layer for other models, in training."""
    made = MoE(16, (4, 8), 4, rngs=nnx.Rngs(0), shared=8, gated=True, bias=True)
    y, report = made(jnp.ones((B, L, 16)), train=True, rngs=key)
    made.update_router(report)
    return y + report.dropped_fraction


def rejects_an_untrue_shape() -> bool:
    """Returns True if arrays of wrong shapes are rejected, in a dataclass and in a module."""
    segments = jnp.ones((B, L), jnp.int32)
    longer = jnp.ones((B, L + 1), jnp.int32)
    untrue = [lambda: View(segments, longer), lambda: FeedForward(NETWORK, KEY)(jnp.ones((L, 4)))]
    for call in untrue:
        try:
            call()
        except jaxtyping.TypeCheckError:
            continue
        return False
    return True


def evaluate_annotations() -> int:
    """Returns the number of functions and classes whose annotations are names that exist.

    Beartype accepts every value for an annotation that it cannot evaluate.
    """
    count = 0
    for module in [name for name in sys.modules if name.startswith("moe_jax.nn.")]:
        members = [each for each in vars(sys.modules[module]).values() if callable(each)]
        local = [each for each in members if getattr(each, "__module__", "") == module]
        methods = [each for part in local for each in vars(part).values() if callable(each)]
        for each in (*local, *filter(inspect.isfunction, methods)):
            typing.get_type_hints(each)
            count += 1
    return count


def main() -> None:
    """Raises ``jaxtyping.TypeCheckError`` if an annotation is untrue."""
    for name, config in DECODERS.items():
        try:
            jax.eval_shape(lambda config=config: read(config, KEY))
        except Exception as error:
            error.add_note(f"in the decoder {name!r}")
            raise
    jax.eval_shape(lambda: read_pairs(KEY))
    jax.eval_shape(lambda: layer(KEY))
    assert rejects_an_untrue_shape(), "the hook checks nothing"
    count = evaluate_annotations()
    assert count > 100, count
    print(f"{len(DECODERS) + 2} models and {count} functions and classes have true annotations")


if __name__ == "__main__":
    main()
