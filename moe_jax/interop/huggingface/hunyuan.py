"""Hunyuan-A13B: Mixtral's router, a shared expert, and norms of rotated queries and keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moe_jax import routing
from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface.entries import Entry, Matrix
from moe_jax.interop.huggingface.family import GATED, Family, Json, expect, heads_of, network
from moe_jax.interop.huggingface.keys import Key, Keys, number, require, size
from moe_jax.interop.huggingface.known import LLAMA_7B, NOT
from moe_jax.interop.huggingface.llama_like import (
    attention,
    every_layer,
    model_ends,
    norms,
    top_k,
    trunk,
    written,
)
from moe_jax.interop.huggingface.rotary import parameters
from moe_jax.interop.huggingface.unread import EVERYWHERE, NOBODY, TOKENS, TRAINING
from moe_jax.models import DecoderConfig
from moe_jax.nn.attention import Details
from moe_jax.nn.shared import SharedConfig

_ON = Key(bool, True, only=(True,))
_LATENT = ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "v_head_dim", "qk_nope_head_dim")
_UNUSED = (
    *(
        "norm_topk_prob",
        "moe_drop_tokens",
        "moe_random_routing_dropped_token",
        "norm_type",
        "org_vocab_size",
    ),
    *("cla_share_factor", "attention_head_dim", "use_rotary_pos_emb", "position_embedding_xdrope"),
    *("add_classification_head", "class_num", "dense_list", "pool_type", "num_media_embeds"),
    *("capacity_factor", "group_limited_greedy", "n_group", "topk_group", "routed_scaling_factor"),
)
_KEYS = Keys(
    {
        **LLAMA_7B,
        "vocab_size": size(290943),
        "rms_norm_eps": number(1e-5, 0.0),
        "num_experts": size(1),
        "moe_topk": Key(object, 1),
        # Keys of released files, from a class that could also build other models.
        "moe_intermediate_size": Key(object, None, null=True),
        "num_shared_expert": Key(object, 1),
        "moe_layer_num_skipped": Key(int, 0, only=(0,)),
        "mlp_bias": NOT,
        "use_cla": NOT,
        "use_mla": NOT,
        "use_mixed_mlp_moe": _ON,
        "use_qk_norm": _ON,
    },
    EVERYWHERE
    | dict.fromkeys((*_LATENT, *_UNUSED), NOBODY)
    | {"eod_token_id": TOKENS, "moe_aux_loss_coef": TRAINING},
    {"num_experts_per_tok": "moe_topk", "num_local_experts": "num_experts"},
)


def _one(config: Json, name: str, wanted: Any = None) -> int:
    """Returns a number that a file states once, or once per layer.

    Raises:
        ConfigError: If layers differ, or the number is not ``wanted``.
    """
    given = config[name]
    numbers = given if isinstance(given, list) and given else [given]
    if any(number != numbers[0] for number in numbers):
        raise ConfigError(f"{name} in config.json differs between layers, which is not supported")
    number = require(numbers[0], int, f"{name} in config.json")
    if number < 1 or number != (wanted or number):
        raise ConfigError(f"config.json says {name}={number}, but only {wanted or 1} is supported")
    return number


def _stretched(config: Json) -> Json:
    """Returns the settings with the base of rotation that ``alpha`` stretches (NTK-aware)."""
    given = parameters(config)
    if given["rope_type"] != "dynamic" or not given.get("alpha"):
        return config
    dim = heads_of(config)["head_dim"]
    base = given["rope_theta"] * given["alpha"] ** (dim / (dim - 2))
    return config | {"rope_scaling": None, "rope_parameters": {"rope_theta": base}}


def _read(config: Json) -> DecoderConfig:
    bias, width = config["attention_bias"], config["intermediate_size"]
    if config["moe_intermediate_size"] is not None:
        _one(config, "moe_intermediate_size", width)
    _one(config, "num_shared_expert", 1)
    details = Details(qk_norm="rotated", qkv_bias=bias, output_bias=bias)
    router = routing.preset("mixtral", k=_one(config, "moe_topk"), balance_weight=1e-3)
    return DecoderConfig(
        **trunk(_stretched(config), attention=details),
        moe=every_layer(
            config, "num_experts", "intermediate_size", router=router, shared=SharedConfig(width)
        ),
    )


def _write(config: DecoderConfig) -> Json:
    return written(config) | {
        "intermediate_size": config.moe.expert_dim,
        "num_experts": config.moe.num_experts,
        "moe_topk": top_k(config).k,
        "attention_bias": expect(config.attention, Details).qkv_bias,
    }


def _entries(config: DecoderConfig) -> Iterator[Entry]:
    yield from model_ends(config)
    for i in range(config.num_layers):
        layer, ours = f"model.layers.{i}", f"layers.{i}"
        yield from norms(layer, ours)
        yield from attention(config, layer, ours, ("query_layernorm", "key_layernorm"))
        mlp, inner = f"{layer}.mlp", f"{ours}.feed_forward"
        yield Entry(f"{mlp}.gate.wg.weight", (f"{inner}.router.kernel",), Matrix())
        yield from network(f"{mlp}.shared_mlp", f"{inner}.shared.network", GATED)
        for e in range(config.moe.num_experts):
            yield from network(f"{mlp}.experts.{e}", f"{inner}.experts", GATED, f"|{e}")


HUNYUAN_V1_MOE = Family(
    "hunyuan_v1_moe",
    "HunYuanMoEV1ForCausalLM",
    _read,
    _write,
    _entries,
    _KEYS,
    DecoderConfig,
    exact=(".mlp.gate.wg.weight",),
)
