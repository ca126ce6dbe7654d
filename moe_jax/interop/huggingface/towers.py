"""Text models of Qwen3-VL and GLM-4.5V, which are read without the vision tower.

On text alone their rotary positions are those of Qwen3-MoE and GLM-4.5, as which they are exported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from moe_jax.interop.huggingface.entries import EitherWay, Entry, Matrix
from moe_jax.interop.huggingface.family import GATED, Json, network
from moe_jax.interop.huggingface.glm import GLM4_MOE
from moe_jax.interop.huggingface.keys import Key, Keys, number, size
from moe_jax.interop.huggingface.known import FLAG, NOT, ON
from moe_jax.interop.huggingface.llama_like import QWEN3_MOE, attention, model_ends, norms
from moe_jax.interop.huggingface.unread import EVERYWHERE, NOBODY, TOKENS
from moe_jax.models import DecoderConfig

_IMAGE_TOKENS = ("image_token_id", "image_start_token_id", "image_end_token_id")
_OUTER = Keys(
    {"text_config": Key(dict, None), "tie_word_embeddings": FLAG},
    EVERYWHERE
    | dict.fromkeys(
        (
            *("vision_config", *_IMAGE_TOKENS),
            *("video_token_id", "video_start_token_id", "video_end_token_id"),
            *("vision_start_token_id", "vision_end_token_id"),
        ),
        "the key belongs to the vision tower",
    ),
)


def _in_language_model(name: str) -> bool:
    return name.startswith(("model.language_model.", "lm_head.", "language_model."))


def _qwen_keys() -> Keys:
    kept = {
        name: key
        for name, key in QWEN3_MOE.keys.read.items()
        if name not in ("norm_topk_prob", "sliding_window", "use_sliding_window")
    }
    sizes = {
        "intermediate_size": size(5632),
        "num_attention_heads": size(16),
        "num_key_value_heads": size(16, null=True),
        "max_position_embeddings": size(128000),
        "rope_theta": number(500000.0, null=True),
        "tie_word_embeddings": ON,
        "moe_intermediate_size": size(1408),
        "num_experts_per_tok": size(4),
        "num_experts": size(60),
    }
    unread = dict.fromkeys(("norm_topk_prob", "sliding_window", "use_sliding_window"), NOBODY)
    return dataclasses.replace(
        QWEN3_MOE.keys, read=kept | sizes, unread={**QWEN3_MOE.keys.unread, **unread}
    )


def _read_qwen(config: Json) -> DecoderConfig:
    fixed = {"norm_topk_prob": True, "sliding_window": None, "use_sliding_window": False}
    return QWEN3_MOE.build(config | fixed)


def _qwen_entries(config: DecoderConfig) -> Iterator[Entry]:
    """Yields the tensors; all experts of a layer are joined, in one of two orders of their axes."""
    yield from model_ends(config)
    sparse = config.moe.moe_layers(config.num_layers)
    for i in range(config.num_layers):
        layer, ours = f"model.layers.{i}", f"layers.{i}"
        yield from norms(layer, ours)
        yield from attention(config, layer, ours)
        inner = f"{ours}.feed_forward"
        if i not in sparse:
            yield from network(f"{layer}.mlp", inner, GATED)
            continue
        yield Entry(f"{layer}.mlp.gate.weight", (f"{inner}.router.kernel",), Matrix())
        both = (f"{inner}.experts.gate", f"{inner}.experts.up")
        yield Entry(f"{layer}.mlp.experts.gate_up_proj", both, EitherWay())
        yield Entry(f"{layer}.mlp.experts.down_proj", (f"{inner}.experts.down",), EitherWay())


def _glm_keys() -> Keys:
    changed = {
        "vocab_size": size(151424),
        "max_position_embeddings": size(65536),
        "attention_bias": ON,
        "use_qk_norm": NOT,
        "router_aux_loss_coef": number(0.0001, 0.0),
    }
    keys = GLM4_MOE.keys
    # transformers writes the tokens of images into the text model's configuration, too.
    unread = {**keys.unread, **dict.fromkeys(_IMAGE_TOKENS, TOKENS)}
    return dataclasses.replace(keys, read={**keys.read, **changed}, unread=unread)


def _read_glm(config: Json) -> DecoderConfig:
    return GLM4_MOE.build(config | {"aux_loss_alpha": config["router_aux_loss_coef"]})


QWEN3_VL_MOE = dataclasses.replace(
    QWEN3_MOE,
    name="qwen3_vl_moe_text",
    build=_read_qwen,
    entries=_qwen_entries,
    keys=_qwen_keys(),
    beside=lambda config, name: not _in_language_model(name),
    renamed={"model.language_model.": "model."},
    outer=_OUTER,
    aliases=("qwen3_vl_moe",),
    exported="qwen3_moe",
)
GLM4V_MOE = dataclasses.replace(
    GLM4_MOE,
    name="glm4v_moe_text",
    build=_read_glm,
    keys=_glm_keys(),
    beside=lambda config, name: not _in_language_model(name),
    renamed={"model.language_model.": "model."},
    outer=_OUTER,
    aliases=("glm4v_moe",),
    exported="glm4_moe",
)
