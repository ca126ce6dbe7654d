"""Mixtral, Qwen2-MoE, Qwen3-MoE and OLMoE: Llama's decoder with experts one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from moe_jax import routing
from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface.entries import Entry, Matrix, Same
from moe_jax.interop.huggingface.family import (
    ACTIVATIONS,
    GATED,
    Family,
    Json,
    activation,
    ends,
    network,
    projections,
    refuse,
    rope_parameters,
    rotary,
)
from moe_jax.models import DecoderConfig
from moe_jax.nn.attention import Details
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.norm import NormConfig
from moe_jax.nn.shared import SharedConfig


def trunk(config: Json, **more) -> dict:
    """Returns what the decoders of Llama's form share."""
    heads = config["num_attention_heads"]
    return {
        "num_layers": config["num_hidden_layers"],
        "width": config["hidden_size"],
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "mlp_dim": config["intermediate_size"],
        "activation": activation(config["hidden_act"]),
        "gated": True,
        "positions": rotary(config),
        "norm": NormConfig(eps=config["rms_norm_eps"]),
        "tie_embeddings": config.get("tie_word_embeddings", False),
        "scale_embedding": False,
        **more,
    }


def written(config: DecoderConfig) -> Json:
    """Writes what they share."""
    act = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    return {
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.width,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads or config.num_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "hidden_act": act[config.activation],
        "rope_parameters": rope_parameters(config.positions),
        "rms_norm_eps": config.norm.eps,
        "tie_word_embeddings": config.tie_embeddings,
    }


def norms(layer: str, ours: str) -> Iterator[Entry]:
    """Yields the two norms of a layer."""
    yield Entry(f"{layer}.input_layernorm.weight", (f"{ours}.attention_norm.scale",), Same())
    name = f"{layer}.post_attention_layernorm.weight"
    yield Entry(name, (f"{ours}.feed_forward_norm.scale",), Same())


def model_ends(config: DecoderConfig) -> Iterator[Entry]:
    """Yields the embedding, the last norm and the head."""
    yield from ends(
        config,
        embedding="model.embed_tokens.weight",
        norm="model.norm.weight",
        head="lm_head.weight",
    )


def attention(config: DecoderConfig, layer: str, ours: str) -> Iterator[Entry]:
    """Yields the attention of a layer."""
    details = config.attention
    theirs, ours = f"{layer}.self_attn", f"{ours}.attention"
    yield from projections(theirs, ours, bias=details.qkv_bias, output_bias=details.output_bias)
    if details.qk_norm in ("head", "width"):
        yield Entry(f"{theirs}.q_norm.weight", (f"{ours}.query_norm",), Same())
        yield Entry(f"{theirs}.k_norm.weight", (f"{ours}.key_norm",), Same())
    if details.sinks:
        yield Entry(f"{theirs}.sinks", (f"{ours}.sinks",), Same())


def experts(layer: str, ours: str, number: int, names: dict[str, str]) -> Iterator[Entry]:
    """Yields experts that are each a network of their own, and the router."""
    inner = f"{ours}.feed_forward"
    yield Entry(f"{layer}.gate.weight", (f"{inner}.router.kernel",), Matrix())
    for e in range(number):
        yield from network(f"{layer}.experts.{e}", f"{inner}.experts", names, f"|{e}")


def _entries(config: DecoderConfig, block: str, names: dict[str, str]) -> Iterator[Entry]:
    yield from model_ends(config)
    sparse = config.moe.moe_layers(config.num_layers)
    for i in range(config.num_layers):
        layer, ours = f"model.layers.{i}", f"layers.{i}"
        yield from norms(layer, ours)
        yield from attention(config, layer, ours)
        if i not in sparse:
            yield from network(f"{layer}.mlp", f"{ours}.feed_forward", GATED)
            continue
        yield from experts(f"{layer}.{block}", ours, config.moe.num_experts, names)
        if config.moe.shared.hidden:
            shared = f"{ours}.feed_forward.shared"
            yield from network(f"{layer}.{block}.shared_expert", f"{shared}.network", GATED)
            name = f"{layer}.{block}.shared_expert_gate.weight"
            yield Entry(name, (f"{shared}.gate",), Matrix())


def _moe(config: Json, number: str, width: str, **more) -> MoEConfig:
    experts = config.get(number) or config["num_local_experts"]
    return MoEConfig(
        every=1, num_experts=experts, expert_dim=config[width], transport="gather", **more
    )


def _read_mixtral(config: Json) -> DecoderConfig:
    refuse(config, sliding_window=None)
    router = routing.preset("mixtral", k=config["num_experts_per_tok"])
    moe = _moe(config, "num_local_experts", "intermediate_size", router=router)
    return DecoderConfig(**trunk(config), moe=moe)


def _write_mixtral(config: DecoderConfig) -> Json:
    return written(config) | {
        "intermediate_size": config.moe.expert_dim,
        "num_local_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.router.select.k,
        "sliding_window": None,
    }


def _top_k(config: Json) -> routing.Router:
    name = "qwen3_moe" if config["norm_topk_prob"] else "qwen2_moe"
    return routing.preset(name, k=config["num_experts_per_tok"])


def _sparse(config: Json) -> tuple[int, ...]:
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    layers = range(config["num_hidden_layers"])
    return tuple(i for i in layers if (i + 1) % step == 0 and i not in dense)


def _read_qwen2(config: Json) -> DecoderConfig:
    refuse(config, use_sliding_window=False)
    shared = SharedConfig(config["shared_expert_intermediate_size"], "sigmoid")
    moe = _moe(config, "num_experts", "moe_intermediate_size", router=_top_k(config), shared=shared)
    moe = dataclasses.replace(moe, layers=_sparse(config))
    bias = Details(qkv_bias=config.get("qkv_bias", True))
    return DecoderConfig(**trunk(config, attention=bias), moe=moe)


def _read_qwen3(config: Json) -> DecoderConfig:
    refuse(config, use_sliding_window=False)
    moe = _moe(config, "num_experts", "moe_intermediate_size", router=_top_k(config))
    moe = dataclasses.replace(moe, layers=_sparse(config))
    bias = config.get("attention_bias", False)
    details = Details(qk_norm="head", qkv_bias=bias, output_bias=bias)
    return DecoderConfig(**trunk(config, attention=details), moe=moe)


def _write_qwen(config: DecoderConfig) -> Json:
    sparse = config.moe.moe_layers(config.num_layers)
    found = written(config) | {
        "num_experts": config.moe.num_experts,
        "moe_intermediate_size": config.moe.expert_dim,
        "num_experts_per_tok": config.moe.router.select.k,
        "norm_topk_prob": config.moe.router.select.normalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(config.num_layers) if i not in sparse],
    }
    if config.moe.shared.hidden:
        found["shared_expert_intermediate_size"] = config.moe.shared.hidden
        return found | {"qkv_bias": config.attention.qkv_bias}
    return found | {"attention_bias": config.attention.qkv_bias}


def _read_olmoe(config: Json) -> DecoderConfig:
    moe = _moe(config, "num_experts", "intermediate_size", router=_top_k(config))
    bias = config.get("attention_bias", False)
    details = Details(
        qk_norm="width",
        clip=config.get("clip_qkv") or 0.0,
        qkv_bias=bias,
        output_bias=bias,
    )
    return DecoderConfig(**trunk(config, attention=details), moe=moe)


def _write_olmoe(config: DecoderConfig) -> Json:
    if config.head_dim * config.num_heads != config.width:
        raise ConfigError("OLMoE's heads fill its width: head_dim x num_heads is not width")
    found = written(config) | {
        "intermediate_size": config.moe.expert_dim,
        "num_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.router.select.k,
        "norm_topk_prob": config.moe.router.select.normalize,
        "clip_qkv": config.attention.clip or None,
        "attention_bias": config.attention.qkv_bias,
    }
    del found["head_dim"]
    return found


MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    _read_mixtral,
    _write_mixtral,
    lambda config: _entries(config, "block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}),
)
QWEN2_MOE = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    _read_qwen2,
    _write_qwen,
    lambda config: _entries(config, "mlp", GATED),
)
QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    _read_qwen3,
    _write_qwen,
    lambda config: _entries(config, "mlp", GATED),
)
OLMOE = Family(
    "olmoe",
    "OlmoeForCausalLM",
    _read_olmoe,
    _write_olmoe,
    lambda config: _entries(config, "mlp", GATED),
)
