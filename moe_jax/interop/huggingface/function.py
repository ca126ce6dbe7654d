"""Reduces a configuration to the settings that determine the logits of the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moe_jax.config.schema import describe
from moe_jax.models import DecoderConfig, EncoderDecoderConfig, ModelConfig

_TRAINING = frozenset(
    {
        "balance",
        "capacity",
        "dropout",
        "expert_dropout",
        "final_mask",
        "group_size",
        "init",
        "init_scale",
        "input_dropout",
        "input_jitter",
        "mask_padding",
        "precision",
        "rate",
        "rule",
        "transport",
        "allow_future_leak",
        "noise",
    }
)


def function_of(config: ModelConfig) -> dict[str, Any]:
    """Returns the settings that determine the logits, by dotted name.

    Two models with equal settings and parameters have equal logits as long as no token is dropped.
    """
    parts = {
        "positions": config.positions,
        "norm": config.norm,
        "tie_embeddings": config.tie_embeddings,
        "scale_embedding": config.scale_embedding,
        "scale_head": config.scale_head,
        "embedding_factor": config.embedding_factor,
        "residual_factor": config.residual_factor,
        "logit_factor": config.logit_factor,
        "logit_cap": config.logit_cap,
        "layer_scale": config.layer_scale,
        **_stacks(config),
    }
    flat: dict[str, Any] = {}
    for name, value in parts.items():
        flat |= dict(_flat(describe(value), name))
    return flat


def _stacks(config: ModelConfig) -> dict[str, Any]:
    if isinstance(config, DecoderConfig):
        layers = config.layers()
        stacks = {"layers": layers, "lookahead": layers[-1:] * config.lookahead}
    elif isinstance(config, EncoderDecoderConfig):
        stacks = {
            "encoder": config.blocks(config.encoder_layers, config.encoder_moe),
            "decoder": config.blocks(config.decoder_layers, config.decoder_moe, cross=True),
        }
    return {
        f"{stack}.{i}.{name}": value
        for stack, blocks in stacks.items()
        for i, block in enumerate(blocks)
        for name, value in (
            ("attention", block.attention),
            ("attention_experts", block.attention_experts),
            ("cross_attention", block.cross_attention),
            ("feed_forward", block.feed_forward),
            ("moe", block.moe),
        )
    }


def _flat(described: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(described, dict):
        for key, value in described.items():
            if key not in _TRAINING:
                yield from _flat(value, f"{name}.{key}")
    elif isinstance(described, float):
        yield name, float(f"{described:.6g}")
    else:
        yield name, described
