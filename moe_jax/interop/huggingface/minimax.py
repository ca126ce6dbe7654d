"""MiniMax-M2: Mixtral's experts under a sigmoid router, and attention that rotates half a head."""

from __future__ import annotations

import dataclasses

from moe_jax import routing
from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface.family import Family, Json, expect
from moe_jax.interop.huggingface.keys import Key, Keys, number, size
from moe_jax.interop.huggingface.known import INDICES, LLAMA
from moe_jax.interop.huggingface.llama_like import (
    BIAS,
    NUMBERED,
    entries,
    every_layer,
    partly_rotary,
    top_k,
    trunk,
    written,
)
from moe_jax.interop.huggingface.unread import EVERYWHERE, NOBODY
from moe_jax.models import DecoderConfig
from moe_jax.nn.attention import Details

_ON = Key(bool, True, only=(True,))
_BIAS = dataclasses.replace(BIAS, theirs="e_score_correction_bias")
_AHEAD = dict.fromkeys(
    ("use_mtp", "num_mtp_modules", "mtp_transformer_layers"),
    "the key belongs to modules for later tokens, which released files do not store",
)
_LINEAR = dict.fromkeys(
    (
        f"layernorm_{kind}_{weight}"
        for kind in ("full_attention", "linear_attention", "mlp")
        for weight in ("alpha", "beta")
    ),
    "the key belongs to MiniMax-Text-01",
)
_KEYS = Keys(
    {
        **LLAMA,
        "vocab_size": size(200064),
        "hidden_size": size(3072),
        "intermediate_size": size(1536),
        "num_hidden_layers": size(62),
        "num_attention_heads": size(48),
        "num_key_value_heads": size(8),
        "head_dim": size(128),
        "max_position_embeddings": size(196608),
        "rms_norm_eps": number(1e-6, 0.0),
        "rope_theta": number(5000000.0, null=True),
        "rotary_dim": size(None, null=True),
        "num_experts_per_tok": size(8),
        "num_local_experts": size(256),
        "router_aux_loss_coef": number(0.001, 0.0),
        "router_jitter_noise": number(0.0, 0.0),
        # Keys of released files, from a class that could also build other models.
        "attn_type_list": INDICES,
        "qk_norm_type": Key(str, "per_layer", only=("per_layer",)),
        "scoring_func": Key(str, "sigmoid", only=("sigmoid",)),
        "shared_intermediate_size": Key(int, 0, only=(0,)),
        "sliding_window": Key(int, None, null=True, only=(None,)),
        "use_qk_norm": _ON,
        "use_routing_bias": _ON,
    },
    EVERYWHERE
    | _AHEAD
    | _LINEAR
    | {
        "mlp_intermediate_size": NOBODY,
        "shared_moe_mode": "the model has no shared experts",
        "max_model_len": "the key limits the length of texts in servers",
    },
    {"num_experts": "num_local_experts"},
)


def _read(config: Json) -> DecoderConfig:
    if any(kind != 1 for kind in config["attn_type_list"] or []):
        raise ConfigError(
            "attn_type_list in config.json has layers with linear attention, but only 1, full "
            "attention, is supported"
        )
    if config["rotary_dim"] and config["partial_rotary_factor"] is None:
        config = config | {"partial_rotary_factor": config["rotary_dim"] / config["head_dim"]}
    router = routing.preset(
        "deepseek_v3",
        k=config["num_experts_per_tok"],
        groups=1,
        keep_groups=1,
        scale=1.0,
        balance_weight=config["router_aux_loss_coef"],
    )
    router = dataclasses.replace(router, input_jitter=float(config["router_jitter_noise"]))
    return DecoderConfig(
        **trunk(config, partly_rotary(config), attention=Details(qk_norm="width")),
        moe=every_layer(config, "num_local_experts", "intermediate_size", router=router),
    )


def _write(config: DecoderConfig) -> Json:
    expect(config.attention, Details)
    return written(config) | {
        "intermediate_size": config.moe.expert_dim,
        "num_local_experts": config.moe.num_experts,
        "num_experts_per_tok": top_k(config).k,
    }


MINIMAX_M2 = Family(
    "minimax_m2",
    "MiniMaxM2ForCausalLM",
    _read,
    _write,
    lambda config: entries(config, "block_sparse_moe", NUMBERED, _BIAS),
    _KEYS,
    DecoderConfig,
    renamed={".mlp.": ".block_sparse_moe."},
)
