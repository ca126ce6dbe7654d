"""K-EXAONE: DeepSeek-V3's experts; layers with a window rotate, and layers without one do not."""

from __future__ import annotations

import dataclasses

from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface.deepseek import (
    balanced_router,
    entries,
    mixture,
    written_mixture,
)
from moe_jax.interop.huggingface.family import Family, Json, expect
from moe_jax.interop.huggingface.keys import Key, Keys, number, size
from moe_jax.interop.huggingface.known import LLAMA, NAMES, ON
from moe_jax.interop.huggingface.llama_like import (
    BIAS,
    layer_kinds,
    trunk,
    windowed,
    written,
    written_windows,
)
from moe_jax.interop.huggingface.unread import EVERYWHERE
from moe_jax.models import DecoderConfig
from moe_jax.nn.attention import Details

_KEYS = Keys(
    {
        **LLAMA,
        "vocab_size": size(102400),
        "hidden_size": size(4096),
        "intermediate_size": size(16384),
        "num_hidden_layers": size(32),
        "num_attention_heads": size(32),
        "num_key_value_heads": size(32),
        "max_position_embeddings": size(2048),
        "rms_norm_eps": number(1e-5, 0.0),
        "sliding_window": size(4096, null=True),
        "sliding_window_pattern": Key(object, 4, null=True),
        "layer_types": NAMES,
        "mlp_layer_types": NAMES,
        "first_k_dense_replace": size(1, 0),
        "moe_intermediate_size": size(1024),
        "num_experts": size(64),
        "num_experts_per_tok": size(8),
        "num_shared_experts": size(1, 0),
        "norm_topk_prob": ON,
        "routed_scaling_factor": number(2.5),
        "n_group": size(1),
        "topk_group": size(1),
        "scoring_func": Key(str, "sigmoid", only=("sigmoid",)),
        "topk_method": Key(str, "noaux_tc", only=("noaux_tc",)),
    },
    EVERYWHERE
    | dict.fromkeys(
        ("num_nextn_predict_layers", "mtp_loss_type", "mtp_share_layers"),
        "the key belongs to the module for later tokens, which is not read",
    ),
)
_BIAS = dataclasses.replace(BIAS, theirs="e_score_correction_bias")
_RENAMED = {"n_routed_experts": "num_experts", "n_shared_experts": "num_shared_experts"}


def _kinds(config: Json) -> list[str]:
    """Returns the kinds of layers; the pattern is a period, or letters L (window) and G (full)."""
    layers, pattern = config["num_hidden_layers"], config["sliding_window_pattern"]
    if isinstance(pattern, str) and pattern and set(pattern) <= set("LG"):
        full = [pattern[i % len(pattern)] == "G" or i == layers - 1 for i in range(layers)]
    elif isinstance(pattern, int) and pattern > 0:
        full = [(i + 1) % pattern == 0 for i in range(layers)]
    elif config["layer_types"] or pattern is None:
        full = [True] * layers
    else:
        raise ConfigError(
            f"config.json says sliding_window_pattern={pattern!r}, but it must be a whole number "
            "above 0, or letters L and G"
        )
    local = "sliding_attention" if config["sliding_window"] else None
    otherwise = ["full_attention" if f else "sliding_attention" for f in full]
    return layer_kinds(config, otherwise if local else ["full_attention"] * layers, local)


def _dense(config: Json) -> int:
    """Returns the number of dense layers, which must be the first ones."""
    kinds, layers = config["mlp_layer_types"], config["num_hidden_layers"]
    if kinds is None:
        return config["first_k_dense_replace"]
    dense = kinds.count("dense")
    if kinds != ["dense"] * dense + ["sparse"] * (layers - dense):
        raise ConfigError(
            f"mlp_layer_types in config.json must name {layers} layers, first dense ones and then "
            "sparse ones"
        )
    return dense


def _read(config: Json) -> DecoderConfig:
    config = config | {ours: config[theirs] for ours, theirs in _RENAMED.items()}
    config |= {"first_k_dense_replace": _dense(config)}
    kinds, rotates = _kinds(config), not config["sliding_window"]
    attention = windowed(config, kinds, Details(qk_norm="head"), full_rotates=rotates)
    return DecoderConfig(**trunk(config, **attention), moe=mixture(config, balanced_router(config)))


def _write(config: DecoderConfig) -> Json:
    expect(config.attention, Details)
    experts = written_mixture(config)
    experts |= {theirs: experts.pop(ours) for ours, theirs in _RENAMED.items()}
    dense = experts["first_k_dense_replace"]
    sparse = config.num_layers - dense
    return (
        written(config)
        | experts
        | written_windows(config)
        | {"mlp_layer_types": ["dense"] * dense + ["sparse"] * sparse}
    )


EXAONE_MOE = Family(
    "exaone_moe",
    "ExaoneMoeForCausalLM",
    _read,
    _write,
    lambda config: entries(config, _BIAS),
    _KEYS,
    DecoderConfig,
    exact=(".mlp.gate.weight",),
    beside=lambda config, name: name.startswith("mtp."),
    renamed={".mlp.gate.e_score_correction_bias": ".mlp.e_score_correction_bias"},
)
