"""gpt-oss and Llama 4: a tensor holds all experts of a layer, and gate and up share a tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from moe_jax import routing
from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface import known
from moe_jax.interop.huggingface.entries import Columns, Entry, Matrix, Same, Whole, Without
from moe_jax.interop.huggingface.family import (
    GATED,
    Family,
    Json,
    expect,
    network,
)
from moe_jax.interop.huggingface.llama_like import (
    attention,
    layer_kinds,
    model_ends,
    norms,
    plain_attention,
    top_k,
    trunk,
    window,
    written,
)
from moe_jax.interop.huggingface.rotary import rotary
from moe_jax.models import AttentionOverride, DecoderConfig
from moe_jax.nn.attention import Details
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.shared import SharedConfig

_GPT_OSS_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _read_gpt_oss(config: Json) -> DecoderConfig:
    config = config | {"rope_parameters": config["rope_parameters"] or _GPT_OSS_YARN}
    bias = config["attention_bias"]
    everywhere = Details(qkv_bias=bias, output_bias=bias, sinks=True)
    layers = range(config["num_hidden_layers"])
    alternating = [f"{'full' if i % 2 else 'sliding'}_attention" for i in layers]
    kinds = layer_kinds(config, alternating, "sliding_attention")
    full = tuple(i for i in layers if kinds[i] == "full_attention")
    local = everywhere
    if len(full) < len(kinds):
        local = dataclasses.replace(everywhere, window=window(config))
    shape = trunk(
        config,
        attention=local,
        attention_overrides=(AttentionOverride(layers=full, details=everywhere),),
        activation="quick_gelu",
        mlp_bias=True,
        mlp_limit=float(config["swiglu_limit"]),
        mlp_up_offset=1.0,
    )
    weight = config["router_aux_loss_coef"]
    moe = MoEConfig(
        every=1,
        num_experts=config["num_local_experts"],
        expert_dim=config["intermediate_size"],
        router=routing.preset("gpt_oss", k=config["num_experts_per_tok"], balance_weight=weight),
        transport="gather",
    )
    return DecoderConfig(**shape, moe=moe)


def _write_gpt_oss(config: DecoderConfig) -> Json:
    windows = [layer.details.window for layer in plain_attention(config)]
    return written(dataclasses.replace(config, activation="silu")) | {
        "intermediate_size": config.moe.expert_dim,
        "num_local_experts": config.moe.num_experts,
        "num_experts_per_tok": top_k(config).k,
        "attention_bias": expect(config.attention, Details).qkv_bias,
        "swiglu_limit": config.mlp_limit,
        "sliding_window": max(windows),
        "layer_types": ["sliding_attention" if w else "full_attention" for w in windows],
    }


def _gpt_oss_entries(config: DecoderConfig) -> Iterator[Entry]:
    yield from model_ends(config)
    for i in range(config.num_layers):
        layer, ours = f"model.layers.{i}", f"layers.{i}"
        yield from norms(layer, ours)
        yield from attention(config, layer, ours)
        inner, mlp = f"{ours}.feed_forward", f"{layer}.mlp"
        experts = f"{inner}.experts"
        yield Entry(f"{mlp}.router.weight", (f"{inner}.router.kernel",), Matrix())
        yield Entry(f"{mlp}.router.bias", (f"{inner}.router.bias",), Same())
        both, bias = (f"{experts}.gate", f"{experts}.up"), Columns(in_turns=True)
        yield Entry(f"{mlp}.experts.gate_up_proj", both, Columns(in_turns=True))
        both = (f"{experts}.gate_bias", f"{experts}.up_bias")
        yield Entry(f"{mlp}.experts.gate_up_proj_bias", both, Without(bias))
        yield Entry(f"{mlp}.experts.down_proj", (f"{experts}.down",), Whole())
        yield Entry(f"{mlp}.experts.down_proj_bias", (f"{experts}.down_bias",), Without(Whole()))


def _rotates(config: Json) -> list[int]:
    """Returns 1 for every layer with rotary positions and 0 for the others.

    An empty ``no_rope_layers`` counts as absent, as in ``transformers``.

    Raises:
        ConfigError: If ``no_rope_layers`` has another length than ``num_hidden_layers``.
    """
    layers, step = range(config["num_hidden_layers"]), config["no_rope_layer_interval"]
    rotates = config["no_rope_layers"] or [int((i + 1) % step != 0) for i in layers]
    if len(rotates) != len(layers):
        raise ConfigError(
            f"no_rope_layers in config.json names {len(rotates)} layers, and num_hidden_layers is "
            f"{len(layers)}"
        )
    return rotates


def _llama4_attention(config: Json) -> tuple[AttentionOverride, ...]:
    rotates, chunk = _rotates(config), config["attention_chunk_size"]
    chunked = ["chunked_attention" if r and chunk else "full_attention" for r in rotates]
    kinds = layer_kinds(config, chunked, "chunked_attention" if chunk else None)
    normalized, bias = config["use_qk_norm"], config["attention_bias"]

    def override(i: int) -> AttentionOverride:
        heated = config["attn_temperature_tuning"] and not rotates[i]
        details = Details(
            qkv_bias=bias,
            output_bias=bias,
            qk_norm="unit" if normalized and rotates[i] else "none",
            chunk=chunk or 0 if kinds[i] == "chunked_attention" else 0,
            temperature=float(config["attn_scale"]) if heated else 0.0,
            temperature_length=config["floor_scale"],
        )
        return AttentionOverride(layers=(i,), rotary=bool(rotates[i]), details=details)

    return tuple(map(override, range(len(kinds))))


def _read_llama4(config: Json) -> DecoderConfig:
    step, layers = config["interleave_moe_layer_step"], config["num_hidden_layers"]
    sparse = config["moe_layers"]
    sparse = range(step - 1, layers, step) if sparse is None else sparse
    weight = config["router_aux_loss_coef"]
    moe = MoEConfig(
        layers=tuple(sparse),
        every=0,
        num_experts=config["num_local_experts"],
        expert_dim=config["intermediate_size"],
        router=routing.preset("llama4", k=config["num_experts_per_tok"], balance_weight=weight),
        transport="gather",
        shared=SharedConfig(config["intermediate_size"]),
    )
    shape = trunk(
        config,
        mlp_dim=config["intermediate_size_mlp"],
        positions=rotary(config, interleaved=True),
        attention_overrides=_llama4_attention(config),
    )
    return DecoderConfig(**shape, moe=moe)


def _write_llama4(config: DecoderConfig) -> Json:
    layers = plain_attention(config)
    unrotated = [layer.details for layer in layers if layer.rotary is None]
    temperature = max((details.temperature for details in unrotated), default=0.0)
    chunks = [layer.details.chunk for layer in layers]
    return written(config) | {
        "intermediate_size": config.moe.expert_dim,
        "intermediate_size_mlp": config.mlp_dim,
        "num_local_experts": config.moe.num_experts,
        "num_experts_per_tok": top_k(config).k,
        "moe_layers": list(config.moe.moe_layers(config.num_layers)),
        "no_rope_layers": [int(layer.rotary is not None) for layer in layers],
        "attention_chunk_size": max(chunks) or None,
        "layer_types": ["chunked_attention" if c else "full_attention" for c in chunks],
        "use_qk_norm": any(layer.details.qk_norm == "unit" for layer in layers),
        "attn_temperature_tuning": bool(temperature),
        "attn_scale": temperature,
        "floor_scale": unrotated[0].temperature_length if unrotated else 8192,
        "attention_bias": layers[0].details.qkv_bias,
    }


def _llama4_entries(config: DecoderConfig) -> Iterator[Entry]:
    yield from model_ends(config)
    sparse = config.moe.moe_layers(config.num_layers)
    for i in range(config.num_layers):
        layer, ours = f"model.layers.{i}", f"layers.{i}"
        yield from norms(layer, ours)
        yield from attention(config, layer, ours)
        inner, mlp = f"{ours}.feed_forward", f"{layer}.feed_forward"
        if i not in sparse:
            yield from network(mlp, inner, GATED)
            continue
        yield Entry(f"{mlp}.router.weight", (f"{inner}.router.kernel",), Matrix())
        both = (f"{inner}.experts.gate", f"{inner}.experts.up")
        yield Entry(f"{mlp}.experts.gate_up_proj", both, Columns())
        yield Entry(f"{mlp}.experts.down_proj", (f"{inner}.experts.down",), Whole())
        yield from network(f"{mlp}.shared_expert", f"{inner}.shared.network", GATED)


GPT_OSS = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    _read_gpt_oss,
    _write_gpt_oss,
    _gpt_oss_entries,
    known.GPT_OSS,
    DecoderConfig,
)
LLAMA4 = Family(
    "llama4_text",
    "Llama4ForCausalLM",
    _read_llama4,
    _write_llama4,
    _llama4_entries,
    known.LLAMA4,
    DecoderConfig,
    prefix="language_model.",
    beside=lambda config, name: name.startswith(("vision_model.", "multi_modal_projector.")),
    outer=known.LLAMA4_OUTER,
    aliases=("llama4",),
)
