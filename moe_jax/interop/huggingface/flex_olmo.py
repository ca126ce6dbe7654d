"""FlexOLMo: OLMoE's experts and attention, with norms of the outputs of the branches."""

from __future__ import annotations

import dataclasses

from moe_jax.interop.huggingface.family import GATED, Family, Json
from moe_jax.interop.huggingface.keys import Keys, number, size
from moe_jax.interop.huggingface.known import FLAG, LLAMA
from moe_jax.interop.huggingface.llama_like import entries, read_olmoe, write_olmoe
from moe_jax.interop.huggingface.unread import EVERYWHERE, NOBODY
from moe_jax.models import DecoderConfig

_KEYS = Keys(
    {
        **LLAMA,
        "vocab_size": size(100352),
        "hidden_size": size(4096),
        "intermediate_size": size(11008),
        "num_hidden_layers": size(32),
        "num_attention_heads": size(32),
        "num_key_value_heads": size(None, null=True),
        "max_position_embeddings": size(4096),
        "rope_theta": number(500000.0, null=True),
        "rms_norm_eps": number(1e-6, 0.0),
        "attention_bias": FLAG,
        "num_experts_per_tok": size(5),
        "num_experts": size(7),
        "router_aux_loss_coef": number(0.01, 0.0),
        "norm_topk_prob": FLAG,
    },
    EVERYWHERE | {"clip_qkv": NOBODY},
    {"num_local_experts": "num_experts"},
)
_NORMS = {
    "post_attention_layernorm": "attention_output_norm",
    "post_feedforward_layernorm": "feed_forward_output_norm",
}


def _read(config: Json) -> DecoderConfig:
    decoder = read_olmoe(config | {"clip_qkv": None})
    norm = dataclasses.replace(decoder.norm, place="output")
    return dataclasses.replace(decoder, norm=norm)


def _write(config: DecoderConfig) -> Json:
    keys = write_olmoe(config)
    del keys["clip_qkv"]
    # The default of transformers lies outside small vocabularies.
    return keys | {"pad_token_id": None}


FLEX_OLMO = Family(
    "flex_olmo",
    "FlexOlmoForCausalLM",
    _read,
    _write,
    lambda config: entries(config, "mlp", GATED, norm_names=_NORMS),
    _KEYS,
    DecoderConfig,
)
