"""Mistral 4: DeepSeek's latent attention with a temperature, and softmax routers.

Mistral Small 4 is released as the text model of a ``mistral3`` file with a vision tower.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from moe_jax import routing
from moe_jax.interop.huggingface.deepseek import (
    entries,
    groups_of,
    latent_decoder,
    written_latent,
)
from moe_jax.interop.huggingface.entries import Entry
from moe_jax.interop.huggingface.family import Family, Json, expect
from moe_jax.interop.huggingface.keys import Key, Keys, number, size
from moe_jax.interop.huggingface.known import LATENT, ON
from moe_jax.interop.huggingface.layouts import as_stored
from moe_jax.interop.huggingface.unread import DERIVED, EVERYWHERE
from moe_jax.models import DecoderConfig
from moe_jax.nn.latent import Latent
from moe_jax.nn.positions import Rotary
from moe_jax.routing.select import Limit, TopK

_BETA = "llama_4_scaling_beta"
# Defaults of transformers for a file without rotary positions.
_ROPE: Json = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 128.0,
    "original_max_position_embeddings": 8192,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    _BETA: 0.1,
}
_KEYS = Keys(
    {
        **LATENT,
        "vocab_size": size(131072),
        "hidden_size": size(4096),
        "intermediate_size": size(12288),
        "moe_intermediate_size": size(2048),
        "num_hidden_layers": size(36),
        "num_attention_heads": size(32),
        "num_key_value_heads": size(32, null=True),
        "max_position_embeddings": size(1048576),
        "kv_lora_rank": size(256),
        "q_lora_rank": size(1024, null=True),
        "qk_nope_head_dim": size(64),
        "first_k_dense_replace": size(0, 0),
        "n_group": size(1, null=True),
        "topk_group": size(1, null=True),
        "n_routed_experts": size(128),
        "n_shared_experts": size(1, 0),
        "norm_topk_prob": Key(bool, True, null=True),
        "num_experts_per_tok": size(4),
        "rope_interleave": Key(bool, True, null=True),
        "routed_scaling_factor": number(1.0),
    },
    EVERYWHERE | {"qk_head_dim": DERIVED, "head_dim": DERIVED},
    {"num_local_experts": "n_routed_experts"},
)


_OUTER = Keys(
    {"text_config": Key(dict, None), "tie_word_embeddings": ON},
    EVERYWHERE
    | dict.fromkeys(
        (
            *("vision_config", "image_token_id", "image_token_index", "projector_hidden_act"),
            *("vision_feature_layer", "multimodal_projector_bias", "spatial_merge_size"),
        ),
        "the key belongs to the vision tower",
    ),
)
_TOWERS = ("vision_tower.", "multi_modal_projector.")


def _in_tower(name: str) -> bool:
    return name.removeprefix("model.").startswith(_TOWERS)


def _router(config: Json) -> routing.Router:
    """Returns the router: softmax, whose best groups have the largest sums of two scores."""
    groups, keep = groups_of(config)
    router = routing.preset("qwen3_moe", k=config["num_experts_per_tok"])
    select = dataclasses.replace(
        expect(router.select, TopK),
        normalize=bool(config["norm_topk_prob"]),
        scale=float(config["routed_scaling_factor"]),
        limit=Limit(groups, keep, "top2") if groups > 1 else None,
    )
    return dataclasses.replace(router, select=select)


def _read(config: Json) -> DecoderConfig:
    name = "rope_scaling" if config["rope_scaling"] else "rope_parameters"
    given = dict(config[name] or _ROPE)
    beta = float(given.pop(_BETA, None) or 0.0)
    # Files repeat the length of the model and the share of rotated features here.
    for derived in ("max_position_embeddings", "partial_rotary_factor"):
        given.pop(derived, None)
    rotated = config | {name: given, "partial_rotary_factor": None}
    decoder = latent_decoder(rotated, _router(config), interleaved=bool(config["rope_interleave"]))
    length = given.get("original_max_position_embeddings") or config["max_position_embeddings"]
    heat: dict[str, Any] = {"temperature": beta, "temperature_length": length} if beta else {}
    latent = dataclasses.replace(expect(decoder.attention, Latent), **heat)
    return dataclasses.replace(decoder, attention=latent)


def _write(config: DecoderConfig) -> Json:
    latent = expect(config.attention, Latent)
    keys = written_latent(config)
    rope = {_BETA: latent.temperature}
    if latent.temperature:
        rope["original_max_position_embeddings"] = latent.temperature_length
    share = latent.rotary_dim / (latent.rotary_dim + latent.plain_dim)
    keys["rope_parameters"] |= rope | {"partial_rotary_factor": share}
    return keys | {
        "rope_interleave": expect(config.positions, Rotary).interleaved,
        "head_dim": latent.rotary_dim + latent.plain_dim,
    }


def _entries(config: DecoderConfig) -> Iterator[Entry]:
    """Yields all tensors; transformers reads Mistral 4 with the experts joined only."""
    sparse = config.moe.moe_layers(config.num_layers)
    experts = [f"model.layers.{i}.mlp.experts" for i in sparse]
    joined = {f"{name}.{matrix}" for name in experts for matrix in ("gate_up_proj", "down_proj")}
    yield from as_stored(entries(config), joined)


MISTRAL4 = Family(
    "mistral4",
    "Mistral4ForCausalLM",
    _read,
    _write,
    _entries,
    _KEYS,
    DecoderConfig,
    exact=(".mlp.gate.weight",),
    beside=lambda config, name: _in_tower(name),
    prefix="language_model.",
    renamed={"model.language_model.": "model."},
    outer=_OUTER,
    aliases=("mistral3",),
)
