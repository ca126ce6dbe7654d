"""Mixtral, Qwen2-MoE, Qwen3-MoE and OLMoE: Llama's decoder; each expert has tensors of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from moe_jax import routing
from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface import known
from moe_jax.interop.huggingface.entries import Entry, Matrix, Same
from moe_jax.interop.huggingface.family import (
    ACTIVATIONS,
    GATED,
    Family,
    Json,
    activation,
    ends,
    expect,
    heads_of,
    network,
    projections,
    rope_parameters,
)
from moe_jax.interop.huggingface.rotary import rotary
from moe_jax.models import AttentionOverride, DecoderConfig
from moe_jax.nn.attention import AttentionConfig, Details
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.norm import NormConfig
from moe_jax.nn.positions import Rotary
from moe_jax.nn.shared import SharedConfig
from moe_jax.routing.select import TopK


def trunk(config: Json, positions: Rotary | None = None, **more: Any) -> dict[str, Any]:
    """Returns the settings of a decoder like Llama's, apart from its experts.

    Args:
        config: All settings of the family.
        positions: Rotation of queries and keys; ``None`` for the whole head, in halves.
        **more: Fields of ``DecoderConfig`` to add or replace.
    """
    return {
        "num_layers": config["num_hidden_layers"],
        "width": config["hidden_size"],
        **heads_of(config),
        "mlp_dim": config["intermediate_size"],
        "activation": activation(config["hidden_act"]),
        "gated": True,
        "positions": positions or rotary(config),
        "norm": NormConfig(eps=float(config["rms_norm_eps"])),
        "tie_embeddings": config["tie_word_embeddings"],
        "scale_embedding": False,
        **more,
    }


def partly_rotary(config: Json, *, interleaved: bool = False) -> Rotary:
    """Returns the rotary positions of a family that may rotate a part of each head.

    Args:
        config: All settings of the family.
        interleaved: Whether neighbouring features form the pairs that are rotated.

    Raises:
        ConfigError: If the number of rotated features is odd or 0.
    """
    positions = rotary(config, interleaved=interleaved, partial=True)
    dim = heads_of(config)["head_dim"]
    turned = int(dim * positions.share)
    if turned != positions.rotated(dim):
        raise ConfigError(
            f"config.json says partial_rotary_factor={positions.share}, which rotates {turned} of "
            f"the {dim} features of a head, but features are rotated in pairs"
        )
    return positions


def written(config: DecoderConfig) -> Json:
    """Returns the keys of ``config.json`` that ``trunk`` reads."""
    act = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    return {
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.width,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads or config.num_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "hidden_act": act[config.activation],
        "rope_parameters": rope_parameters(expect(config.positions, Rotary)),
        "rms_norm_eps": config.norm.eps,
        "tie_word_embeddings": config.tie_embeddings,
    }


def top_k(config: DecoderConfig) -> TopK:
    """Returns the settings by which tokens choose their ``k`` best experts.

    Raises:
        UnsupportedPart: If the router selects in another way.
    """
    return expect(config.moe.router.select, TopK)


def plain_attention(config: DecoderConfig) -> list[AttentionConfig]:
    """Returns the attention of every layer.

    Raises:
        UnsupportedPart: If the attention is latent.
    """
    expect(config.attention, Details)
    return [expect(config.attention_at(i), AttentionConfig) for i in range(config.num_layers)]


INPUT_NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "feed_forward_norm",
}
"""Names here of the norms of a layer, by their names in Llama."""


def norms(layer: str, ours: str, names: dict[str, str] = INPUT_NORMS) -> Iterator[Entry]:
    """Yields the norms of a layer; ``names`` has their names here, by their names there."""
    for theirs, name in names.items():
        yield Entry(f"{layer}.{theirs}.weight", (f"{ours}.{name}.scale",), Same())


def model_ends(config: DecoderConfig) -> Iterator[Entry]:
    """Yields the embedding, the final norm and the head."""
    yield from ends(
        config,
        embedding="model.embed_tokens.weight",
        norm="model.norm.weight",
        head="lm_head.weight",
    )


QK_NORMS = ("q_norm", "k_norm")
"""Names of the norms of queries and keys in most families."""


def attention(
    config: DecoderConfig,
    layer: str,
    ours: str,
    qk_norms: tuple[str, str] = QK_NORMS,
    index: int = 0,
) -> Iterator[Entry]:
    """Yields the attention of a layer.

    Args:
        config: Configuration of the model.
        layer: Name of the layer in ``transformers``.
        ours: Name of the layer here.
        qk_norms: Names of the norms of queries and keys.
        index: Index of the layer, for families whose layers have different tensors.
    """
    details = expect(config.attention_at(index), AttentionConfig).details
    theirs, ours = f"{layer}.self_attn", f"{ours}.attention"
    yield from projections(
        theirs,
        ours,
        bias=details.qkv_bias,
        output_bias=details.output_bias,
        names="qk" if details.keys_as_values else "qkv",
    )
    if details.qk_norm in ("head", "width", "rotated"):
        query, key = qk_norms
        yield Entry(f"{theirs}.{query}.weight", (f"{ours}.query_norm",), Same())
        yield Entry(f"{theirs}.{key}.weight", (f"{ours}.key_norm",), Same())
    if details.output_gate:
        yield Entry(f"{theirs}.gate_proj.weight", (f"{ours}.output_gate",), Matrix())
    if details.sinks:
        yield Entry(f"{theirs}.sinks", (f"{ours}.sinks",), Same())


BIAS = Entry("gate.e_score_correction_bias", (), Same())
"""The bias on the selection of experts, where DeepSeek-V3 stores it in its layer."""


def experts(
    layer: str, ours: str, moe: MoEConfig, names: dict[str, str], bias: Entry = BIAS
) -> Iterator[Entry]:
    """Yields the router and the experts, each with tensors of its own.

    Args:
        layer: Name of the mixture-of-experts layer in ``transformers``.
        ours: Name of the transformer layer here.
        moe: Settings of the layer.
        names: Name of each matrix in ``transformers``, by its name here.
        bias: Name in the layer, and layout, of the bias if the router has one.
    """
    inner = f"{ours}.feed_forward"
    yield Entry(f"{layer}.gate.weight", (f"{inner}.router.kernel",), Matrix())
    for name in moe.router.select.state_shapes(moe.num_experts):
        state = (f"{inner}.router.state.{name}",)
        yield Entry(f"{layer}.{bias.theirs}", state, bias.layout)
    for e in range(moe.num_experts):
        yield from network(f"{layer}.experts.{e}", f"{inner}.experts", names, f"|{e}")


def entries(
    config: DecoderConfig,
    block: str,
    names: dict[str, str],
    bias: Entry = BIAS,
    norm_names: dict[str, str] = INPUT_NORMS,
) -> Iterator[Entry]:
    """Yields all tensors of a decoder like Llama's.

    Args:
        config: Configuration of the model.
        block: Name of the mixture-of-experts layer within a layer.
        names: Name of each matrix of an expert in ``transformers``, by its name here.
        bias: Name in the layer, and layout, of the bias if the router has one.
        norm_names: Names here of the norms of a layer, by their names in ``transformers``.
    """
    yield from model_ends(config)
    sparse = config.moe.moe_layers(config.num_layers)
    for i in range(config.num_layers):
        layer, ours = f"model.layers.{i}", f"layers.{i}"
        yield from norms(layer, ours, norm_names)
        yield from attention(config, layer, ours)
        if i not in sparse:
            yield from network(f"{layer}.mlp", f"{ours}.feed_forward", GATED)
            continue
        yield from experts(f"{layer}.{block}", ours, config.moe, names, bias)
        shared = f"{ours}.feed_forward.shared"
        if config.moe.shared.mix == "sigmoid":
            yield from network(f"{layer}.{block}.shared_expert", f"{shared}.network", GATED)
            name = f"{layer}.{block}.shared_expert_gate.weight"
            yield Entry(name, (f"{shared}.gate",), Matrix())
        elif config.moe.shared.hidden:
            yield from network(f"{layer}.{block}.shared_experts", f"{shared}.network", GATED)


NUMBERED = {"gate": "w1", "up": "w3", "down": "w2"}
"""Names of the matrices of Mixtral's experts, by their names here."""


def layer_kinds(config: Json, otherwise: list[str], local: str | None) -> list[str]:
    """Returns the kind of attention of every layer.

    Args:
        config: All settings of the family.
        otherwise: Kinds of attention for a file without ``layer_types``.
        local: Kind that layers may have instead of full attention; ``None`` for no other kind.

    Raises:
        ConfigError: If ``layer_types`` has another length than ``num_hidden_layers``, or another
            kind.
    """
    kinds, layers = config["layer_types"] or otherwise, config["num_hidden_layers"]
    allowed = ["full_attention", *([local] if local else [])]
    if len(kinds) != layers:
        raise ConfigError(
            f"layer_types in config.json names {len(kinds)} layers, and num_hidden_layers is "
            f"{layers}"
        )
    for kind in kinds:
        if kind not in allowed:
            raise ConfigError(
                f"layer_types in config.json has {kind!r}, but the other keys allow only "
                f"{' or '.join(allowed)}"
            )
    return kinds


def every_layer(config: Json, number: str, width: str, **more: Any) -> MoEConfig:
    """Returns experts in every layer, for the keys of their number and of their width."""
    return MoEConfig(
        every=1, num_experts=config[number], expert_dim=config[width], transport="gather", **more
    )


def _read_mixtral(config: Json) -> DecoderConfig:
    router = routing.preset(
        "mixtral", k=config["num_experts_per_tok"], balance_weight=config["router_aux_loss_coef"]
    )
    router = dataclasses.replace(router, input_jitter=float(config["router_jitter_noise"]))
    moe = every_layer(config, "num_local_experts", "intermediate_size", router=router)
    details = Details(window=config["sliding_window"] or 0)
    return DecoderConfig(**trunk(config, attention=details), moe=moe)


def _write_mixtral(config: DecoderConfig) -> Json:
    return written(config) | {
        "intermediate_size": config.moe.expert_dim,
        "num_local_experts": config.moe.num_experts,
        "num_experts_per_tok": top_k(config).k,
        "sliding_window": expect(config.attention, Details).window or None,
    }


def _top_k(config: Json) -> routing.Router:
    name = "qwen3_moe" if config["norm_topk_prob"] else "qwen2_moe"
    weight = config["router_aux_loss_coef"]
    return routing.preset(name, k=config["num_experts_per_tok"], balance_weight=weight)


def _sparse(config: Json) -> tuple[int, ...]:
    step, dense = config["decoder_sparse_step"], config["mlp_only_layers"] or []
    layers = range(config["num_hidden_layers"])
    return tuple(i for i in layers if (i + 1) % step == 0 and i not in dense)


def _qwen_moe(config: Json, **more: Any) -> MoEConfig:
    moe = every_layer(config, "num_experts", "moe_intermediate_size", router=_top_k(config), **more)
    return dataclasses.replace(moe, every=0, layers=_sparse(config))


def _qwen2_windows(config: Json) -> list[str]:
    """Returns the kinds of layers: even layers below ``max_window_layers`` have a window."""
    used, last = config["use_sliding_window"], config["max_window_layers"]
    return [
        "sliding_attention" if used and i % 2 == 0 and i < last else "full_attention"
        for i in range(config["num_hidden_layers"])
    ]


def _read_qwen2(config: Json) -> DecoderConfig:
    local_kind = "sliding_attention" if config["use_sliding_window"] else None
    kinds = layer_kinds(config, _qwen2_windows(config), local_kind)
    details = Details(qkv_bias=config["qkv_bias"])
    shared = SharedConfig(config["shared_expert_intermediate_size"], "sigmoid")
    shape = trunk(config, **windowed(config, kinds, details))
    return DecoderConfig(**shape, moe=_qwen_moe(config, shared=shared))


def windowed(
    config: Json, kinds: list[str], details: Details, *, full_rotates: bool = True
) -> dict[str, Any]:
    """Returns the fields of ``DecoderConfig`` for layers with a window and layers without one.

    Args:
        config: All settings of the family.
        kinds: Kind of attention of every layer.
        details: Details of attention in all layers, without the window.
        full_rotates: Whether layers with full attention have rotary positions.

    Raises:
        ConfigError: If a layer has a window, and ``config.json`` lacks ``sliding_window``.
    """
    full = tuple(i for i, kind in enumerate(kinds) if kind == "full_attention")
    if len(full) == len(kinds) and full_rotates:
        return {"attention": details}
    local = details
    if len(full) < len(kinds):
        local = dataclasses.replace(details, window=window(config))
    other = AttentionOverride(layers=full, rotary=full_rotates, details=details)
    return {"attention": local, "attention_overrides": (other,) if full else ()}


def written_windows(config: DecoderConfig) -> Json:
    """Returns the keys of ``config.json`` for layers with a window and layers without one."""
    windows = [layer.details.window for layer in plain_attention(config)]
    return {
        "sliding_window": max(windows) or None,
        "layer_types": ["sliding_attention" if w else "full_attention" for w in windows],
    }


def window(config: Json) -> int:
    """Returns the number of tokens that a layer with a sliding window sees.

    Raises:
        ConfigError: If ``config.json`` lacks ``sliding_window``.
    """
    if not config["sliding_window"]:
        raise ConfigError(
            "config.json has layers with sliding_attention but no sliding_window: add that key"
        )
    return config["sliding_window"]


def _read_qwen3(config: Json) -> DecoderConfig:
    bias, width = config["attention_bias"], config["sliding_window"]
    details = Details(
        qk_norm="head",
        qkv_bias=bias,
        output_bias=bias,
        window=width or 0 if config["use_sliding_window"] else 0,
    )
    return DecoderConfig(**trunk(config, attention=details), moe=_qwen_moe(config))


def _write_qwen(config: DecoderConfig) -> Json:
    sparse = config.moe.moe_layers(config.num_layers)
    details, select = expect(config.attention, Details), top_k(config)
    keys = written(config) | {
        "num_experts": config.moe.num_experts,
        "moe_intermediate_size": config.moe.expert_dim,
        "num_experts_per_tok": select.k,
        "norm_topk_prob": select.normalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(config.num_layers) if i not in sparse],
    }
    if config.moe.shared.hidden:
        keys["shared_expert_intermediate_size"] = config.moe.shared.hidden
        windows = written_windows(config)
        return (
            keys
            | windows
            | {
                "qkv_bias": details.qkv_bias,
                "use_sliding_window": bool(windows["sliding_window"]),
            }
        )
    return keys | {
        "attention_bias": details.qkv_bias,
        "use_sliding_window": bool(details.window),
        "sliding_window": details.window or None,
    }


def read_olmoe(config: Json) -> DecoderConfig:
    """Returns OLMoE's decoder: norms of queries and keys over their width, bounds of both."""
    moe = every_layer(config, "num_experts", "intermediate_size", router=_top_k(config))
    bias = config["attention_bias"]
    details = Details(
        qk_norm="width",
        clip=float(config["clip_qkv"] or 0.0),
        qkv_bias=bias,
        output_bias=bias,
    )
    return DecoderConfig(**trunk(config, attention=details), moe=moe)


def write_olmoe(config: DecoderConfig) -> Json:
    """Returns the keys of ``config.json`` that ``read_olmoe`` reads.

    Raises:
        ConfigError: If the heads are not as wide as the model.
    """
    if config.head_dim * config.num_heads != config.width:
        raise ConfigError(
            "the family needs model.head_dim x model.num_heads="
            f"{config.head_dim * config.num_heads} equal to model.width={config.width}: change one "
            "of them"
        )
    details, select = expect(config.attention, Details), top_k(config)
    keys = written(config) | {
        "intermediate_size": config.moe.expert_dim,
        "num_experts": config.moe.num_experts,
        "num_experts_per_tok": select.k,
        "norm_topk_prob": select.normalize,
        "clip_qkv": details.clip or None,
        "attention_bias": details.qkv_bias,
    }
    del keys["head_dim"]
    return keys


MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    _read_mixtral,
    _write_mixtral,
    lambda config: entries(config, "block_sparse_moe", NUMBERED),
    known.MIXTRAL,
    DecoderConfig,
    renamed={".mlp.": ".block_sparse_moe."},
)
QWEN2_MOE = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    _read_qwen2,
    _write_qwen,
    lambda config: entries(config, "mlp", GATED),
    known.QWEN2_MOE,
    DecoderConfig,
)
QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    _read_qwen3,
    _write_qwen,
    lambda config: entries(config, "mlp", GATED),
    known.QWEN3_MOE,
    DecoderConfig,
)
OLMOE = Family(
    "olmoe",
    "OlmoeForCausalLM",
    read_olmoe,
    write_olmoe,
    lambda config: entries(config, "mlp", GATED),
    known.OLMOE,
    DecoderConfig,
)
