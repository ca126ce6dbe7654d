"""Gemma 4 with experts: a dense network beside them, and wider heads in layers without a window."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from moe_jax import routing
from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface.entries import Entry, ExpertMatrices, Matrix, Same
from moe_jax.interop.huggingface.family import (
    ACTIVATIONS,
    GATED,
    Family,
    Json,
    activation,
    expect,
    heads_of,
    network,
    rope_parameters,
)
from moe_jax.interop.huggingface.keys import Key, Keys, number, require, size
from moe_jax.interop.huggingface.known import FLAG, NAMES, OBJECT, ON
from moe_jax.interop.huggingface.llama_like import (
    attention,
    every_layer,
    layer_kinds,
    model_ends,
    plain_attention,
    top_k,
    window,
    written_windows,
)
from moe_jax.interop.huggingface.rotary import rotary
from moe_jax.interop.huggingface.unread import EVERYWHERE
from moe_jax.models import AttentionOverride, DecoderConfig
from moe_jax.nn.attention import Details
from moe_jax.nn.norm import NormConfig
from moe_jax.nn.positions import Rotary
from moe_jax.nn.shared import SharedConfig
from moe_jax.routing.normed_heads import NormedLinear

_LOCAL, _FULL = "sliding_attention", "full_attention"
_ROPE = {
    _LOCAL: {"rope_type": "default", "rope_theta": 10000.0},
    _FULL: {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
}
_KEYS = Keys(
    {
        "vocab_size": size(262144),
        "hidden_size": size(2304),
        "intermediate_size": size(9216),
        "num_hidden_layers": size(30),
        "num_attention_heads": size(8),
        "num_key_value_heads": size(4),
        "head_dim": size(256),
        "global_head_dim": size(512),
        "num_global_key_value_heads": size(None, null=True),
        "per_layer_config": OBJECT,
        "hidden_activation": Key(str, "gelu_pytorch_tanh"),
        "max_position_embeddings": size(131072),
        "rms_norm_eps": number(1e-6, 0.0),
        "tie_word_embeddings": ON,
        "rope_parameters": OBJECT,
        "attention_bias": FLAG,
        "attention_k_eq_v": FLAG,
        "sliding_window": size(512),
        "layer_types": NAMES,
        "final_logit_softcapping": number(None, 0.0, null=True),
        "use_bidirectional_attention": Key(str, None, null=True, only=("vision",)),
        "hidden_size_per_layer_input": Key(int, 256, null=True, only=(0,)),
        "num_kv_shared_layers": Key(int, 0, null=True, only=(0,)),
        "enable_moe_block": Key(bool, False, only=(True,)),
        "num_experts": size(None),
        "top_k_experts": size(None),
        "moe_intermediate_size": size(None),
    },
    EVERYWHERE
    | {
        "expert_intermediate_size": "transformers reads moe_intermediate_size instead",
        "use_double_wide_mlp": "only layers that share keys with others read the key",
        "vocab_size_per_layer_input": "the model has no embeddings per layer",
    },
)
_OUTER = Keys(
    {"text_config": Key(dict, None), "tie_word_embeddings": ON},
    EVERYWHERE
    | dict.fromkeys(
        (
            *("vision_config", "image_token_id", "boi_token_id", "eoi_token_id", "video_token_id"),
            *("audio_config", "audio_token_id", "boa_token_id", "eoa_token_id", "eoa_token_index"),
            "vision_soft_tokens_per_image",
        ),
        "the key belongs to the towers of images and sound",
    ),
)
_TOWERS = tuple(
    f"model.{part}." for part in ("vision_tower", "embed_vision", "audio_tower", "embed_audio")
)
# Names of the norms of a layer, by their names here.
_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_output_norm": "post_attention_layernorm",
    "feed_forward.shared.norm": "pre_feedforward_layernorm",
    "feed_forward.shared.output_norm": "post_feedforward_layernorm_1",
    "feed_forward_norm": "pre_feedforward_layernorm_2",
    "feed_forward.shared.routed_norm": "post_feedforward_layernorm_2",
    "feed_forward_output_norm": "post_feedforward_layernorm",
}


def _kinds(config: Json) -> list[str]:
    """Returns the kind of attention of every layer; the last one never has a window."""
    layers = config["num_hidden_layers"]
    otherwise = [_LOCAL if (i + 1) % 6 else _FULL for i in range(layers)]
    return [*layer_kinds(config, otherwise, _LOCAL)[:-1], _FULL]


def _rotary(config: Json, kind: str, dim: int) -> Rotary:
    """Returns the rotary positions of one kind of layers.

    Raises:
        ConfigError: If no feature of a head would be rotated, or the parameters are missing.
    """
    given = config["rope_parameters"] or _ROPE
    where = f"{kind} in rope_parameters of config.json"
    own: dict[str, Any] = {
        "rope_parameters": require(given.get(kind), dict, where),
        "max_position_embeddings": config["max_position_embeddings"],
    }
    absent = ("rope_scaling", "original_max_position_embeddings", "rope_theta")
    positions = rotary(dict.fromkeys((*absent, "partial_rotary_factor")) | own)
    if dim * positions.share < 2:
        raise ConfigError(
            f"{where} says partial_rotary_factor={positions.share}, which rotates no pair of the "
            f"{dim} features of a head"
        )
    return positions


def _heads(config: Json, kinds: list[str]) -> tuple[int, int]:
    """Returns the width of a head and the number of key heads in layers without a window.

    Raises:
        ConfigError: If ``per_layer_config`` changes other settings, or layers of one kind differ.
    """
    plain = config["head_dim"], config["num_key_value_heads"]
    given = config["per_layer_config"]
    if given is None:
        shared = config["attention_k_eq_v"] and config["num_global_key_value_heads"]
        return config["global_head_dim"], shared or plain[1]
    found: dict[str, set[tuple[int, int]]] = {_LOCAL: set(), _FULL: set()}
    names = {"head_dim", "num_key_value_heads"}
    for i, kind in enumerate(kinds):
        own = require(given.get(str(i), {}), dict, f"per_layer_config.{i} in config.json")
        for name, value in own.items():
            require(value, int, f"{name} in per_layer_config.{i} of config.json")
        found[kind].add((own.get("head_dim", plain[0]), own.get("num_key_value_heads", plain[1])))
        names |= set(own)
    layers = {str(i) for i in range(len(kinds))}
    fits = set(given) <= layers and names == {"head_dim", "num_key_value_heads"}
    if not fits or found[_LOCAL] - {plain} or len(found[_FULL]) > 1:
        raise ConfigError(
            "per_layer_config in config.json may change head_dim and num_key_value_heads alone, "
            "equally in all layers with full_attention and in no other"
        )
    return found[_FULL].pop()


def _read(config: Json) -> DecoderConfig:
    kinds, bias = _kinds(config), config["attention_bias"]
    dim, kv_heads = _heads(config, kinds)
    details = Details(qk_norm="head", value_norm=True, scale=1.0, qkv_bias=bias, output_bias=bias)
    full = AttentionOverride(
        layers=tuple(i for i, kind in enumerate(kinds) if kind == _FULL),
        details=dataclasses.replace(details, keys_as_values=config["attention_k_eq_v"]),
        positions=_rotary(config, _FULL, dim),
        num_kv_heads=kv_heads,
        head_dim=dim,
    )
    router = routing.preset("gemma4", k=config["top_k_experts"])
    eps = float(config["rms_norm_eps"])
    moe = every_layer(
        config,
        "num_experts",
        "moe_intermediate_size",
        router=dataclasses.replace(router, head=NormedLinear(eps)),
        router_input="residual",
        shared=SharedConfig(config["intermediate_size"], norms=True),
    )
    return DecoderConfig(
        num_layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        **heads_of(config),
        mlp_dim=config["intermediate_size"],
        activation=activation(config["hidden_activation"]),
        gated=True,
        positions=_rotary(config, _LOCAL, config["head_dim"]) if _LOCAL in kinds else Rotary(),
        attention=dataclasses.replace(details, window=window(config)),
        attention_overrides=(full,),
        norm=NormConfig(eps=eps, place="both"),
        tie_embeddings=config["tie_word_embeddings"],
        logit_cap=float(config["final_logit_softcapping"] or 0.0),
        layer_scale=True,
        moe=moe,
    )


def _write(config: DecoderConfig) -> Json:
    layers = plain_attention(config)
    full = next((layer for layer in layers if not layer.details.window), layers[-1])
    local = next((layer for layer in layers if layer.details.window), full)
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items()} | {"gelu": "gelu_pytorch_tanh"}
    return {
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.width,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": local.num_kv_heads,
        "head_dim": local.head_dim,
        "num_global_key_value_heads": full.num_kv_heads,
        "global_head_dim": full.head_dim,
        "intermediate_size": config.moe.shared.hidden,
        "hidden_activation": names[config.activation],
        "rope_parameters": {
            _LOCAL: rope_parameters(expect(local.rotary, Rotary)),
            _FULL: rope_parameters(expect(full.rotary, Rotary)),
        },
        "rms_norm_eps": config.norm.eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": full.details.qkv_bias,
        "attention_k_eq_v": full.details.keys_as_values,
        **written_windows(config),
        "final_logit_softcapping": config.logit_cap or None,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": config.moe.num_experts,
        "top_k_experts": top_k(config).k,
        "moe_intermediate_size": config.moe.expert_dim,
    }


def _entries(config: DecoderConfig) -> Iterator[Entry]:
    yield from model_ends(config)
    for i in range(config.num_layers):
        layer, ours = f"model.layers.{i}", f"layers.{i}"
        for name, theirs in _NORMS.items():
            yield Entry(f"{layer}.{theirs}.weight", (f"{ours}.{name}.scale",), Same())
        yield from attention(config, layer, ours, index=i)
        yield Entry(f"{layer}.layer_scalar", (f"{ours}.output_scale",), Same())
        inner = f"{ours}.feed_forward"
        yield from network(f"{layer}.mlp", f"{inner}.shared.network", GATED)
        yield from _router(f"{layer}.router", f"{inner}.router")
        both = (f"{inner}.experts.gate", f"{inner}.experts.up")
        yield Entry(f"{layer}.experts.gate_up_proj", both, ExpertMatrices())
        yield Entry(f"{layer}.experts.down_proj", (f"{inner}.experts.down",), ExpertMatrices())


def _router(theirs: str, ours: str) -> Iterator[Entry]:
    yield Entry(f"{theirs}.proj.weight", (f"{ours}.kernel",), Matrix())
    yield Entry(f"{theirs}.scale", (f"{ours}.scale",), Same())
    yield Entry(f"{theirs}.per_expert_scale", (f"{ours}.expert_scale",), Same())


GEMMA4 = Family(
    "gemma4_text",
    "Gemma4ForCausalLM",
    _read,
    _write,
    _entries,
    _KEYS,
    DecoderConfig,
    beside=lambda config, name: name.startswith(_TOWERS),
    renamed={"model.language_model.": "model."},
    outer=_OUTER,
    aliases=("gemma4",),
)
