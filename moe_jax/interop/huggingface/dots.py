"""dots.llm1: DeepSeek-V3's experts, and Qwen3's attention with windows in the last layers."""

from __future__ import annotations

from moe_jax.interop.huggingface.deepseek import (
    balanced_router,
    entries,
    mixture,
    written_mixture,
)
from moe_jax.interop.huggingface.family import Family, Json, expect
from moe_jax.interop.huggingface.keys import Key, Keys, number, size
from moe_jax.interop.huggingface.known import FLAG, LLAMA, NAMES
from moe_jax.interop.huggingface.llama_like import (
    layer_kinds,
    trunk,
    windowed,
    written,
    written_windows,
)
from moe_jax.interop.huggingface.unread import EVERYWHERE, NOBODY
from moe_jax.models import DecoderConfig
from moe_jax.nn.attention import Details

_KEYS = Keys(
    {
        **LLAMA,
        "vocab_size": size(152064),
        "hidden_size": size(4608),
        "intermediate_size": size(10944),
        "moe_intermediate_size": size(1408),
        "num_hidden_layers": size(62),
        "num_attention_heads": size(32),
        "num_key_value_heads": size(32, null=True),
        "max_position_embeddings": size(2048),
        "rms_norm_eps": number(1e-6, 0.0),
        "attention_bias": FLAG,
        "sliding_window": size(4096, null=True),
        "max_window_layers": size(62, 0),
        "layer_types": NAMES,
        "n_shared_experts": size(None, 0, null=True),
        "n_routed_experts": size(None),
        "num_experts_per_tok": size(None),
        "n_group": size(1, null=True),
        "topk_group": size(1, null=True),
        "first_k_dense_replace": size(0, 0),
        "norm_topk_prob": Key(bool, False, null=True),
        "routed_scaling_factor": number(1.0),
        "scoring_func": Key(str, "sigmoid", only=("sigmoid", "noaux_tc")),
        "topk_method": Key(str, "noaux_tc", only=("noaux_tc",)),
        "moe_layer_freq": Key(int, 1, only=(1,)),
    },
    EVERYWHERE | dict.fromkeys(("ep_size", "seq_aux", "use_sliding_window"), NOBODY),
    {"num_local_experts": "n_routed_experts"},
)


def _kinds(config: Json) -> list[str]:
    """Returns the kinds of layers: those from ``max_window_layers`` on have a window."""
    first, layers = config["max_window_layers"], range(config["num_hidden_layers"])
    local = "sliding_attention" if config["sliding_window"] else None
    otherwise = [local if local and i >= first else "full_attention" for i in layers]
    return layer_kinds(config, otherwise, local)


def _read(config: Json) -> DecoderConfig:
    bias = config["attention_bias"]
    details = Details(qk_norm="head", qkv_bias=bias, output_bias=bias)
    return DecoderConfig(
        **trunk(config, **windowed(config, _kinds(config), details)),
        moe=mixture(config, balanced_router(config)),
    )


def _write(config: DecoderConfig) -> Json:
    bias = expect(config.attention, Details).qkv_bias
    keys = written(config) | written_mixture(config) | written_windows(config)
    return keys | {"attention_bias": bias}


DOTS1 = Family(
    "dots1",
    "Dots1ForCausalLM",
    _read,
    _write,
    entries,
    _KEYS,
    DecoderConfig,
    exact=(".mlp.gate.weight",),
)
