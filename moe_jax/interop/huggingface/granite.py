"""Granite MoE: Mixtral with constant factors of embeddings, scores, branches and logits."""

from __future__ import annotations

from collections.abc import Iterator

from moe_jax import routing
from moe_jax.interop.huggingface.entries import Entry, ExpertMatrices, Matrix
from moe_jax.interop.huggingface.family import Family, Json, expect
from moe_jax.interop.huggingface.keys import Key, Keys, number, size
from moe_jax.interop.huggingface.known import LLAMA_7B
from moe_jax.interop.huggingface.llama_like import (
    attention,
    every_layer,
    model_ends,
    norms,
    top_k,
    trunk,
    written,
)
from moe_jax.interop.huggingface.unread import EVERYWHERE
from moe_jax.models import DecoderConfig
from moe_jax.nn.attention import Details

_FACTOR = number(1.0, 1e-6)
_KEYS = Keys(
    {
        **LLAMA_7B,
        "embedding_multiplier": _FACTOR,
        "logits_scaling": _FACTOR,
        "residual_multiplier": _FACTOR,
        "attention_multiplier": _FACTOR,
        "num_local_experts": size(8),
        "num_experts_per_tok": size(2),
        "router_aux_loss_coef": Key(float, 0.001, least=0.0),
    },
    EVERYWHERE,
)


def _read(config: Json) -> DecoderConfig:
    bias, weight = config["attention_bias"], config["router_aux_loss_coef"]
    router = routing.preset("mixtral", k=config["num_experts_per_tok"], balance_weight=weight)
    details = Details(qkv_bias=bias, output_bias=bias, scale=float(config["attention_multiplier"]))
    shape = trunk(
        config,
        attention=details,
        embedding_factor=float(config["embedding_multiplier"]),
        residual_factor=float(config["residual_multiplier"]),
        logit_factor=1 / config["logits_scaling"],
    )
    moe = every_layer(config, "num_local_experts", "intermediate_size", router=router)
    return DecoderConfig(**shape, moe=moe)


def _write(config: DecoderConfig) -> Json:
    details = expect(config.attention, Details)
    return written(config) | {
        "intermediate_size": config.moe.expert_dim,
        "num_local_experts": config.moe.num_experts,
        "num_experts_per_tok": top_k(config).k,
        "attention_bias": details.qkv_bias,
        "attention_multiplier": details.scale or config.head_dim**-0.5,
        "embedding_multiplier": config.embedding_factor,
        "residual_multiplier": config.residual_factor,
        "logits_scaling": 1 / config.logit_factor,
    }


def _entries(config: DecoderConfig) -> Iterator[Entry]:
    yield from model_ends(config)
    for i in range(config.num_layers):
        layer, ours = f"model.layers.{i}", f"layers.{i}"
        yield from norms(layer, ours)
        yield from attention(config, layer, ours)
        block, inner = f"{layer}.block_sparse_moe", f"{ours}.feed_forward"
        yield Entry(f"{block}.router.layer.weight", (f"{inner}.router.kernel",), Matrix())
        both = (f"{inner}.experts.gate", f"{inner}.experts.up")
        yield Entry(f"{block}.input_linear.weight", both, ExpertMatrices())
        down = (f"{inner}.experts.down",)
        yield Entry(f"{block}.output_linear.weight", down, ExpertMatrices())


GRANITEMOE = Family(
    "granitemoe",
    "GraniteMoeForCausalLM",
    _read,
    _write,
    _entries,
    _KEYS,
    DecoderConfig,
    renamed={
        ".block_sparse_moe.experts.gate_up_proj": ".block_sparse_moe.input_linear.weight",
        ".block_sparse_moe.experts.down_proj": ".block_sparse_moe.output_linear.weight",
        ".block_sparse_moe.router.weight": ".block_sparse_moe.router.layer.weight",
    },
)
