"""AFMoE (Trinity): a gate on the output of attention, and norms before and after each branch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from moe_jax.interop.huggingface.deepseek import balanced_router, mixture, written_mixture
from moe_jax.interop.huggingface.entries import Entry, Same
from moe_jax.interop.huggingface.family import GATED, Family, Json, expect
from moe_jax.interop.huggingface.keys import Key, Keys, number, size
from moe_jax.interop.huggingface.known import FLAG, LLAMA, NAMES
from moe_jax.interop.huggingface.llama_like import (
    entries,
    layer_kinds,
    trunk,
    windowed,
    written,
    written_windows,
)
from moe_jax.interop.huggingface.unread import EVERYWHERE, PLATFORM, TRAINING
from moe_jax.models import DecoderConfig
from moe_jax.nn.attention import Details

# The code of the releases reads groups of experts; all releases have one group.
_GROUPS = ("n_group", "topk_group", "num_limited_groups", "num_expert_groups")
_KEYS = Keys(
    {
        **LLAMA,
        "vocab_size": size(200192),
        "hidden_size": size(2048),
        "intermediate_size": size(6144),
        "moe_intermediate_size": size(1408),
        "num_hidden_layers": size(32),
        "num_dense_layers": size(1, 0),
        "num_attention_heads": size(16),
        "num_key_value_heads": size(None, null=True),
        "head_dim": size(128),
        "max_position_embeddings": size(16384),
        "rms_norm_eps": number(1e-5, 0.0),
        "attention_bias": FLAG,
        "num_experts": size(64),
        "num_experts_per_tok": size(6),
        "num_shared_experts": size(2, 0),
        "route_scale": number(1.0),
        "global_attn_every_n_layers": size(4),
        "sliding_window": size(1024),
        "layer_types": NAMES,
        "mup_enabled": FLAG,
        "score_func": Key(str, "sigmoid", only=("sigmoid",)),
        "route_norm": Key(bool, True, only=(True,)),
        **dict.fromkeys(_GROUPS, Key(int, 1, null=True, only=(1,))),
    },
    EVERYWHERE | {"use_grouped_mm": PLATFORM, "load_balance_coeff": TRAINING},
    {"num_local_experts": "num_experts"},
)
_NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attention_output_norm",
    "pre_mlp_layernorm": "feed_forward_norm",
    "post_mlp_layernorm": "feed_forward_output_norm",
}
_RENAMED = {
    "n_routed_experts": "num_experts",
    "n_shared_experts": "num_shared_experts",
    "routed_scaling_factor": "route_scale",
    "first_k_dense_replace": "num_dense_layers",
}
_BIAS = Entry("expert_bias", (), Same())


def _kinds(config: Json) -> list[str]:
    """Returns the kinds of layers: each ``global_attn_every_n_layers``-th sees all tokens."""
    every, layers = config["global_attn_every_n_layers"], range(config["num_hidden_layers"])
    otherwise = ["sliding_attention" if (i + 1) % every else "full_attention" for i in layers]
    return layer_kinds(config, otherwise, "sliding_attention")


def _read(config: Json) -> DecoderConfig:
    config = config | {ours: config[theirs] for ours, theirs in _RENAMED.items()}
    config |= {"n_group": 1, "topk_group": 1, "norm_topk_prob": True}
    bias = config["attention_bias"]
    details = Details(qk_norm="head", output_gate=True, qkv_bias=bias, output_bias=bias)
    shape = trunk(config, **windowed(config, _kinds(config), details, full_rotates=False))
    shape["norm"] = dataclasses.replace(shape["norm"], place="both")
    shape["scale_embedding"] = config["mup_enabled"]
    return DecoderConfig(**shape, moe=mixture(config, balanced_router(config)))


def _write(config: DecoderConfig) -> Json:
    details = expect(config.attention, Details)
    mixed = written_mixture(config)
    mixed = {_RENAMED.get(name, name): value for name, value in mixed.items()}
    for name in ("n_group", "topk_group", "norm_topk_prob"):
        mixed.pop(name, None)
    windows = written_windows(config)
    return (
        written(config)
        | mixed
        | windows
        | {
            "sliding_window": windows["sliding_window"] or 1024,
            "attention_bias": details.qkv_bias,
            "mup_enabled": config.scale_embedding,
        }
    )


def _entries(config: DecoderConfig) -> Iterator[Entry]:
    for entry in entries(config, "mlp", GATED, _BIAS, norm_names=_NORMS):
        theirs = entry.theirs.replace(".mlp.gate.", ".mlp.router.gate.")
        yield dataclasses.replace(entry, theirs=theirs)


AFMOE = Family(
    "afmoe",
    "AfmoeForCausalLM",
    _read,
    _write,
    _entries,
    _KEYS,
    DecoderConfig,
)
