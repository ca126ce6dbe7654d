"""ERNIE 4.5: a softmax router with a bias on its selection; pairs of neighbours are rotated."""

from __future__ import annotations

import dataclasses

from moe_jax import routing
from moe_jax.interop.huggingface.entries import Same
from moe_jax.interop.huggingface.family import GATED, Family, Json, expect
from moe_jax.interop.huggingface.keys import Key, Keys, number, size
from moe_jax.interop.huggingface.known import LLAMA, NOT, ON
from moe_jax.interop.huggingface.llama_like import BIAS, entries, top_k, trunk, written
from moe_jax.interop.huggingface.rotary import rotary
from moe_jax.interop.huggingface.unread import EVERYWHERE, NOBODY, TRAINING
from moe_jax.models import DecoderConfig
from moe_jax.nn.attention import Details
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.shared import SharedConfig

_BIAS = dataclasses.replace(
    BIAS, theirs="moe_statics.e_score_correction_bias", layout=Same((1, -1))
)
_KEYS = Keys(
    {
        **LLAMA,
        "vocab_size": size(103424),
        "hidden_size": size(2560),
        "intermediate_size": size(12288),
        "num_hidden_layers": size(28),
        "num_attention_heads": size(20),
        "num_key_value_heads": size(4, null=True),
        "max_position_embeddings": size(131072),
        "rms_norm_eps": number(1e-5, 0.0),
        "rope_theta": number(500000.0, null=True),
        "tie_word_embeddings": ON,
        "use_bias": NOT,
        "moe_intermediate_size": size(1536),
        "moe_k": size(6),
        "moe_num_experts": size(64),
        "moe_num_shared_experts": size(2, 0),
        "moe_layer_start_index": size(1, 0),
        "moe_layer_end_index": size(-1, -1),
        "moe_layer_interval": size(1),
        "moe_norm_min": Key(float, 1e-12),
        "moe_gate": Key(str, "topk", only=("topk",)),
        "moe_use_aux_free": Key(bool, True, only=(True,)),
        "router_aux_loss_coef": number(0.001, 0.0),
    },
    EVERYWHERE
    | dict.fromkeys(("moe_aux_loss_lambda", "moe_orthogonal_loss_lambda"), TRAINING)
    | dict.fromkeys(("moe_capacity", "num_nextn_predict_layers", "use_rmsnorm"), NOBODY),
    {"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"},
)


def _layers(config: Json) -> tuple[int, ...]:
    """Returns the indices of the layers with experts; an end of -1 is the last layer."""
    last = config["num_hidden_layers"] - 1
    end = last if config["moe_layer_end_index"] == -1 else config["moe_layer_end_index"]
    step, start = config["moe_layer_interval"], config["moe_layer_start_index"]
    return tuple(i for i in range(start, min(end, last) + 1) if (i + 1) % step == 0)


def _read(config: Json) -> DecoderConfig:
    width = config["moe_intermediate_size"]
    router = routing.preset(
        "ernie4_5_moe", k=config["moe_k"], balance_weight=config["router_aux_loss_coef"]
    )
    moe = MoEConfig(
        layers=_layers(config),
        every=0,
        num_experts=config["moe_num_experts"],
        expert_dim=width,
        router=router,
        transport="gather",
        shared=SharedConfig(width * config["moe_num_shared_experts"]),
    )
    return DecoderConfig(**trunk(config, rotary(config, interleaved=True)), moe=moe)


def _write(config: DecoderConfig) -> Json:
    expect(config.attention, Details)
    moe = config.moe
    layers = moe.moe_layers(config.num_layers)
    step = layers[1] - layers[0] if len(layers) > 1 else layers[0] + 1
    return written(config) | {
        "moe_intermediate_size": moe.expert_dim,
        "moe_k": top_k(config).k,
        "moe_num_experts": moe.num_experts,
        "moe_num_shared_experts": moe.shared.hidden // moe.expert_dim,
        "moe_layer_start_index": layers[0],
        "moe_layer_end_index": layers[-1],
        "moe_layer_interval": step,
    }


ERNIE4_5_MOE = Family(
    "ernie4_5_moe",
    "Ernie4_5_MoeForCausalLM",
    _read,
    _write,
    lambda config: entries(config, "mlp", GATED, _BIAS),
    _KEYS,
    DecoderConfig,
    exact=(".mlp.gate.weight",),
    beside=lambda config, name: "mtp" in name,
    renamed={".mlp.gate.moe_statics.": ".mlp.moe_statics."},
)
