"""GLM-4.5 and its successors: DeepSeek-V3's experts, and attention that rotates half a head."""

from __future__ import annotations

from moe_jax.interop.huggingface.deepseek import (
    balanced_router,
    entries,
    mixture,
    without_lookahead,
    written_mixture,
)
from moe_jax.interop.huggingface.family import Family, Json, expect
from moe_jax.interop.huggingface.keys import Key, Keys, number, size
from moe_jax.interop.huggingface.known import FLAG, LLAMA, ON
from moe_jax.interop.huggingface.llama_like import partly_rotary, trunk, written
from moe_jax.interop.huggingface.unread import EVERYWHERE
from moe_jax.models import DecoderConfig
from moe_jax.nn.attention import Details
from moe_jax.nn.positions import Rotary

_KEYS = Keys(
    {
        **LLAMA,
        "vocab_size": size(151552),
        "hidden_size": size(4096),
        "intermediate_size": size(10944),
        "num_hidden_layers": size(46),
        "num_attention_heads": size(96),
        "num_key_value_heads": size(8),
        "max_position_embeddings": size(131072),
        "partial_rotary_factor": number(0.5, 0.0, null=True),
        "rms_norm_eps": number(1e-5, 0.0),
        "attention_bias": FLAG,
        "use_qk_norm": FLAG,
        "moe_intermediate_size": size(1408),
        "num_experts_per_tok": size(8),
        "n_shared_experts": size(1, 0),
        "n_routed_experts": size(128),
        "routed_scaling_factor": number(1.0),
        "n_group": size(1),
        "topk_group": size(1),
        "first_k_dense_replace": size(1, 0),
        "norm_topk_prob": ON,
        "scoring_func": Key(str, "sigmoid", only=("sigmoid",)),
        "topk_method": Key(str, "noaux_tc", only=("noaux_tc",)),
        "num_nextn_predict_layers": size(1, 0, null=True),
    },
    EVERYWHERE,
    {"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
)


def _read(config: Json) -> DecoderConfig:
    details = Details(
        qkv_bias=config["attention_bias"], qk_norm="head" if config["use_qk_norm"] else "none"
    )
    return DecoderConfig(
        **trunk(config, partly_rotary(config), attention=details),
        moe=mixture(config, balanced_router(config)),
        lookahead=config["num_nextn_predict_layers"] or 0,
    )


def _write(config: DecoderConfig) -> Json:
    details = expect(config.attention, Details)
    return (
        written(config)
        | written_mixture(config)
        | {
            "partial_rotary_factor": expect(config.positions, Rotary).share,
            "attention_bias": details.qkv_bias,
            "use_qk_norm": details.qk_norm == "head",
            "num_nextn_predict_layers": config.lookahead,
        }
    )


GLM4_MOE = Family(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    _read,
    _write,
    entries,
    _KEYS,
    DecoderConfig,
    exact=(".mlp.gate.weight",),
    without=without_lookahead,
)
