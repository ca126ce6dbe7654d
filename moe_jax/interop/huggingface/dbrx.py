"""DBRX: queries, keys and values share a tensor, and so does each matrix of all experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from moe_jax import routing
from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface import known
from moe_jax.interop.huggingface.entries import Entry, ExpertRows, Matrix, RowRange, Same
from moe_jax.interop.huggingface.family import (
    ACTIVATIONS,
    Family,
    Heads,
    Json,
    activation,
    ends,
    expect,
    heads_of,
)
from moe_jax.interop.huggingface.llama_like import top_k
from moe_jax.interop.huggingface.rotary import rotary
from moe_jax.models import DecoderConfig
from moe_jax.nn.attention import Details
from moe_jax.nn.feed_forward import Activation
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.norm import NormConfig
from moe_jax.nn.positions import Rotary


def _read(config: Json) -> DecoderConfig:
    attention, ffn = config["attn_config"], config["ffn_config"]
    router = routing.preset("dbrx", k=ffn["moe_top_k"], balance_weight=ffn["moe_loss_weight"])
    router = dataclasses.replace(router, input_jitter=float(ffn["moe_jitter_eps"] or 0.0))
    theta = config["rope_theta"] or attention["rope_theta"] or 10000.0
    return DecoderConfig(
        num_layers=config["n_layers"],
        width=config["d_model"],
        **_heads(config),
        mlp_dim=ffn["ffn_hidden_size"],
        activation=_activation(ffn["ffn_act_fn"]),
        gated=True,
        positions=rotary({**config, "rope_theta": theta}),
        attention=Details(clip=float(attention["clip_qkv"] or 0.0)),
        norm=NormConfig("layer", 1e-5),
        tie_embeddings=config["tie_word_embeddings"],
        scale_embedding=False,
        moe=MoEConfig(
            every=1,
            num_experts=ffn["moe_num_experts"],
            expert_dim=ffn["ffn_hidden_size"],
            router=router,
            transport="gather",
        ),
    )


def _heads(config: Json) -> Heads:
    return heads_of(
        {
            "num_attention_heads": config["n_heads"],
            "hidden_size": config["d_model"],
            "num_key_value_heads": config["attn_config"]["kv_n_heads"],
            "head_dim": None,
        }
    )


def _activation(given: Json | None) -> Activation:
    name = (given or {}).get("name", "silu")
    if (given or {}).keys() - {"name"} or not isinstance(name, str):
        raise ConfigError(
            f"ffn_act_fn in config.json is {given!r}, but only an object with the key name is "
            "supported"
        )
    return activation(name)


def _write(config: DecoderConfig) -> Json:
    act = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    positions = expect(config.positions, Rotary)
    return {
        "n_layers": config.num_layers,
        "d_model": config.width,
        "n_heads": config.num_heads,
        "rope_theta": positions.base,
        "tie_word_embeddings": config.tie_embeddings,
        "attn_config": {
            "kv_n_heads": config.num_kv_heads or config.num_heads,
            "clip_qkv": expect(config.attention, Details).clip or None,
            "rope_theta": positions.base,
        },
        "ffn_config": {
            "hidden_size": config.width,
            "ffn_hidden_size": config.moe.expert_dim,
            "ffn_act_fn": {"name": act[config.activation]},
            "moe_num_experts": config.moe.num_experts,
            "moe_top_k": top_k(config).k,
            "moe_normalize_expert_weights": 1.0,
            "moe_loss_weight": config.moe.router.loss_weights.get("balance", 0.0),
            "moe_jitter_eps": config.moe.router.input_jitter or None,
        },
    }


def _entries(config: DecoderConfig) -> Iterator[Entry]:
    yield from ends(
        config,
        embedding="transformer.wte.weight",
        norm="transformer.norm_f.weight",
        head="lm_head.weight",
    )
    for i in range(config.num_layers):
        block, ours = f"transformer.blocks.{i}", f"layers.{i}"
        both, inner = f"{block}.norm_attn_norm", f"{ours}.feed_forward"
        yield Entry(f"{both}.norm_1.weight", (f"{ours}.attention_norm.scale",), Same())
        yield Entry(f"{both}.norm_2.weight", (f"{ours}.feed_forward_norm.scale",), Same())
        fused = tuple(f"{ours}.attention.{name}" for name in ("query", "key", "value"))
        yield Entry(f"{both}.attn.Wqkv.weight", fused, RowRange())
        yield Entry(f"{both}.attn.out_proj.weight", (f"{ours}.attention.output",), Matrix(2))
        yield Entry(f"{block}.ffn.router.layer.weight", (f"{inner}.router.kernel",), Matrix())
        mlp, experts = f"{block}.ffn.experts.mlp", f"{inner}.experts"
        yield Entry(f"{mlp}.w1", (f"{experts}.gate",), ExpertRows(transposed=True))
        yield Entry(f"{mlp}.v1", (f"{experts}.up",), ExpertRows(transposed=True))
        yield Entry(f"{mlp}.w2", (f"{experts}.down",), ExpertRows())


DBRX = Family(
    "dbrx",
    "DbrxForCausalLM",
    _read,
    _write,
    _entries,
    known.DBRX,
    DecoderConfig,
    tied=("lm_head.weight", "transformer.wte.weight"),
    base="transformer.",
)
