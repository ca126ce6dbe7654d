"""Llama, Qwen2 and Qwen3: dense decoders, from which upcycling starts."""

from __future__ import annotations

from collections.abc import Iterator

from moe_jax.interop.huggingface import known
from moe_jax.interop.huggingface.entries import Entry
from moe_jax.interop.huggingface.family import GATED, Family, Json, expect
from moe_jax.interop.huggingface.llama_like import (
    entries,
    layer_kinds,
    trunk,
    windowed,
    written,
    written_windows,
)
from moe_jax.models import DecoderConfig
from moe_jax.nn.attention import Details
from moe_jax.nn.moe_config import MoEConfig

_NO_EXPERTS = MoEConfig(every=0)


def _entries(config: DecoderConfig) -> Iterator[Entry]:
    return entries(config, "mlp", GATED)


def _read_llama(config: Json) -> DecoderConfig:
    bias = config["attention_bias"]
    details = Details(qkv_bias=bias, output_bias=bias)
    return DecoderConfig(**trunk(config, attention=details), moe=_NO_EXPERTS)


def _write_llama(config: DecoderConfig) -> Json:
    return written(config) | {"attention_bias": expect(config.attention, Details).qkv_bias}


def _windows(config: Json) -> list[str]:
    """Returns the kinds of layers: those from ``max_window_layers`` on have a window."""
    first = config["max_window_layers"] if config["use_sliding_window"] else None
    return [
        "full_attention" if first is None or layer < first else "sliding_attention"
        for layer in range(config["num_hidden_layers"])
    ]


def _read_qwen(config: Json, details: Details) -> DecoderConfig:
    local_kind = "sliding_attention" if config["use_sliding_window"] else None
    kinds = layer_kinds(config, _windows(config), local_kind)
    return DecoderConfig(**trunk(config, **windowed(config, kinds, details)), moe=_NO_EXPERTS)


def _write_qwen(config: DecoderConfig) -> Json:
    windows = written_windows(config)
    return written(config) | windows | {"use_sliding_window": bool(windows["sliding_window"])}


def _read_qwen2(config: Json) -> DecoderConfig:
    return _read_qwen(config, Details(qkv_bias=True))


def _read_qwen3(config: Json) -> DecoderConfig:
    bias = config["attention_bias"]
    return _read_qwen(config, Details(qk_norm="head", qkv_bias=bias, output_bias=bias))


def _write_qwen3(config: DecoderConfig) -> Json:
    bias = expect(config.attention, Details).qkv_bias
    return _write_qwen(config) | {"attention_bias": bias}


LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    _read_llama,
    _write_llama,
    _entries,
    known.LLAMA_DENSE,
    DecoderConfig,
)
QWEN2 = Family(
    "qwen2", "Qwen2ForCausalLM", _read_qwen2, _write_qwen, _entries, known.QWEN2, DecoderConfig
)
QWEN3 = Family(
    "qwen3", "Qwen3ForCausalLM", _read_qwen3, _write_qwen3, _entries, known.QWEN3, DecoderConfig
)
