"""DeepSeek-V2, V3 and Kimi K2: latent attention, shared experts and dense first layers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator

from moe_jax import routing
from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface import known
from moe_jax.interop.huggingface.entries import Entry, HeadRows, Matrix, RowRange, Same, Whole
from moe_jax.interop.huggingface.family import (
    GATED,
    Family,
    Json,
    expect,
    network,
)
from moe_jax.interop.huggingface.llama_like import (
    BIAS,
    attention,
    experts,
    model_ends,
    norms,
    top_k,
    trunk,
    written,
)
from moe_jax.interop.huggingface.rotary import parameters, rotary, yarn_scale
from moe_jax.models import DecoderConfig
from moe_jax.nn.latent import Latent
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.positions import Rotary
from moe_jax.nn.shared import SharedConfig
from moe_jax.routing.select import TopK


def _latent(config: Json) -> Latent:
    plain, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    given, scale = parameters(config), 0.0
    if given["rope_type"] != "default" and given.get("mscale_all_dim") and given.get("factor"):
        scale = yarn_scale(given["factor"], given["mscale_all_dim"]) ** 2 / math.sqrt(plain + rope)
    return Latent(
        query_rank=config["q_lora_rank"] or 0,
        kv_rank=config["kv_lora_rank"],
        plain_dim=plain,
        rotary_dim=rope,
        value_dim=config["v_head_dim"],
        scale=scale,
    )


def mixture(config: Json, router: routing.Router) -> MoEConfig:
    """Returns the experts: routed and shared ones in all layers after the first dense ones."""
    width = config["moe_intermediate_size"]
    return MoEConfig(
        layers=tuple(range(config["first_k_dense_replace"], config["num_hidden_layers"])),
        every=0,
        num_experts=config["n_routed_experts"],
        expert_dim=width,
        router=router,
        transport="gather",
        shared=SharedConfig(width * (config["n_shared_experts"] or 0)),
    )


def latent_decoder(
    config: Json, router: routing.Router, *, interleaved: bool = True
) -> DecoderConfig:
    """Returns a decoder with latent attention.

    Args:
        config: All settings of the family.
        router: Router of the MoE layers.
        interleaved: Whether neighbouring features form the pairs that are rotated.
    """
    config = config | {"head_dim": config["qk_rope_head_dim"]}
    positions = rotary(config, interleaved=interleaved)
    shape = trunk(config, attention=_latent(config), positions=positions)
    return DecoderConfig(**shape, moe=mixture(config, router))


def groups_of(config: Json) -> tuple[int, int]:
    """Returns the number of groups of experts and the number of groups that a token may use.

    A null ``n_group`` means one group, and a null ``topk_group`` means all groups.

    Raises:
        ConfigError: If the groups do not divide the experts, or ``topk_group`` exceeds them.
    """
    groups = config["n_group"] or 1
    keep, experts = config["topk_group"] or groups, config["n_routed_experts"]
    if experts % groups:
        raise ConfigError(
            f"config.json says n_group={groups}, which does not divide n_routed_experts={experts}"
        )
    if keep > groups:
        raise ConfigError(
            f"config.json says topk_group={keep}, which is more than n_group={groups}"
        )
    return groups, keep


def _read_v2(config: Json) -> DecoderConfig:
    limited = config["topk_method"] == "group_limited_greedy"
    groups, keep = groups_of(config) if limited else (1, 1)
    router = routing.preset(
        "deepseek_v2",
        k=config["num_experts_per_tok"],
        devices=groups,
        keep_devices=keep,
        scale=float(config["routed_scaling_factor"]),
        drop=False,
        **_losses(config, device_weight=0.0, communication_weight=0.0),
    )
    return latent_decoder(config, router)


def _losses(config: Json, **others: float) -> dict[str, float]:
    """Returns the weights of losses that replace the paper's if ``aux_loss_alpha`` is set."""
    alpha = config.get("aux_loss_alpha")
    return {} if alpha is None else {"balance_weight": float(alpha), **others}


def balanced_router(config: Json) -> routing.Router:
    """Returns DeepSeek-V3's router: sigmoid, and a bias on the selection of experts."""
    groups, keep = groups_of(config)
    router = routing.preset(
        "deepseek_v3",
        k=config["num_experts_per_tok"],
        groups=groups,
        keep_groups=keep,
        scale=float(config["routed_scaling_factor"]),
        **_losses(config),
    )
    select = dataclasses.replace(
        expect(router.select, TopK), normalize=bool(config["norm_topk_prob"])
    )
    return dataclasses.replace(router, select=select)


def _read_v3(config: Json) -> DecoderConfig:
    router = balanced_router(config)
    decoder = latent_decoder(config, router, interleaved=bool(config["rope_interleave"]))
    return dataclasses.replace(decoder, lookahead=config["num_nextn_predict_layers"] or 0)


def written_mixture(config: DecoderConfig) -> Json:
    """Returns the keys of ``config.json`` that ``mixture`` and ``balanced_router`` read."""
    moe, select = config.moe, top_k(config)
    keys = {
        "moe_intermediate_size": moe.expert_dim,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.shared.hidden // moe.expert_dim,
        "num_experts_per_tok": select.k,
        "first_k_dense_replace": min(moe.moe_layers(config.num_layers)),
        "routed_scaling_factor": select.scale,
        "norm_topk_prob": select.normalize,
    }
    if select.limit is not None:
        keys |= {"n_group": select.limit.groups, "topk_group": select.limit.keep}
    return keys


def written_latent(config: DecoderConfig) -> Json:
    """Returns the keys of ``config.json`` that ``latent_decoder`` and ``mixture`` read."""
    latent = expect(config.attention, Latent)
    scaling = expect(config.positions, Rotary).scaling
    keys = (
        written(config)
        | written_mixture(config)
        | {
            "q_lora_rank": latent.query_rank or None,
            "kv_lora_rank": latent.kv_rank,
            "qk_nope_head_dim": latent.plain_dim,
            "qk_rope_head_dim": latent.rotary_dim,
            "v_head_dim": latent.value_dim,
        }
    )
    if latent.scale and scaling is not None:
        plain = math.sqrt(latent.plain_dim + latent.rotary_dim)
        weight = (math.sqrt(latent.scale * plain) - 1) / (0.1 * math.log(scaling.factor))
        keys["rope_parameters"] |= {"mscale": weight, "mscale_all_dim": weight}
    # In transformers, head_dim is the width of the rotated features.
    return keys | {"head_dim": latent.rotary_dim}


def _write_v2(config: DecoderConfig) -> Json:
    limit = top_k(config).limit
    grouped = limit is not None and limit.groups > 1
    return written_latent(config) | {"topk_method": "group_limited_greedy" if grouped else "greedy"}


def _write_v3(config: DecoderConfig) -> Json:
    return written_latent(config) | {
        "rope_interleave": expect(config.positions, Rotary).interleaved,
        "num_nextn_predict_layers": config.lookahead,
    }


def entries(config: DecoderConfig, bias: Entry = BIAS) -> Iterator[Entry]:
    """Yields all tensors of a decoder, with lookahead modules as layers after the last one.

    Args:
        config: Configuration of the model.
        bias: Name in the layer, and layout, of the bias on the selection of experts.
    """
    yield from model_ends(config)
    sparse = config.moe.moe_layers(config.num_layers)
    for i in range(config.num_layers):
        yield from _layer(config, f"model.layers.{i}", f"layers.{i}", i in sparse, bias)
    for step in range(config.lookahead):
        layer, ours = f"model.layers.{config.num_layers + step}", f"lookahead.{step}"
        yield from _layer(config, layer, f"{ours}.layers.0", config.num_layers - 1 in sparse, bias)
        yield Entry(f"{layer}.enorm.weight", (f"{ours}.token_norm.scale",), Same())
        yield Entry(f"{layer}.hnorm.weight", (f"{ours}.hidden_norm.scale",), Same())
        yield Entry(f"{layer}.eh_proj.weight", (f"{ours}.merge",), Matrix())
        yield Entry(f"{layer}.shared_head.norm.weight", (f"{ours}.final_norm.scale",), Same())
        # The module shares the embedding and the head of the model; files store them again.
        yield Entry(f"{layer}.embed_tokens.weight", ("embedding.table",), Whole())
        head, layout = ("table", Whole()) if config.tie_embeddings else ("head", Matrix())
        yield Entry(f"{layer}.shared_head.head.weight", (f"embedding.{head}",), layout)


def _layer(
    config: DecoderConfig, layer: str, ours: str, sparse: bool, bias: Entry
) -> Iterator[Entry]:
    moe = config.moe
    yield from norms(layer, ours)
    if isinstance(config.attention, Latent):
        yield from _latent_attention(config.attention, f"{layer}.self_attn", f"{ours}.attention")
    else:
        yield from attention(config, layer, ours)
    if not sparse:
        yield from network(f"{layer}.mlp", f"{ours}.feed_forward", GATED)
        return
    yield from experts(f"{layer}.mlp", ours, moe, GATED, bias)
    if moe.shared.hidden:
        inner = f"{ours}.feed_forward.shared.network"
        yield from network(f"{layer}.mlp.shared_experts", inner, GATED)


def _latent_attention(latent: Latent, theirs: str, ours: str) -> Iterator[Entry]:
    if latent.query_rank:
        yield Entry(f"{theirs}.q_a_proj.weight", (f"{ours}.query_down",), Matrix())
        yield Entry(f"{theirs}.q_a_layernorm.weight", (f"{ours}.query_norm.scale",), Same())
        yield Entry(f"{theirs}.q_b_proj.weight", (f"{ours}.query",), Matrix())
    else:
        yield Entry(f"{theirs}.q_proj.weight", (f"{ours}.query",), Matrix())
    down = (f"{ours}.down", f"{ours}.rotated")
    yield Entry(f"{theirs}.kv_a_proj_with_mqa.weight", down, RowRange())
    yield Entry(f"{theirs}.kv_a_layernorm.weight", (f"{ours}.norm.scale",), Same())
    yield Entry(f"{theirs}.kv_b_proj.weight", (f"{ours}.key", f"{ours}.value"), HeadRows())
    yield Entry(f"{theirs}.o_proj.weight", (f"{ours}.output",), Matrix(2))


def without_lookahead(settings: Json, names: Collection[str]) -> Json:
    """Returns the settings without the lookahead modules if no tensor of them is stored.

    DeepSeek's files store these modules as layers after the last one; ``transformers`` does not
    store them.
    """
    first = f"model.layers.{settings['num_hidden_layers']}."
    stored = any(name.startswith(first) for name in names)
    return settings if stored else settings | {"num_nextn_predict_layers": 0}


DEEPSEEK_V2 = Family(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    _read_v2,
    _write_v2,
    entries,
    known.DEEPSEEK_V2,
    DecoderConfig,
    exact=(".mlp.gate.weight",),
)
DEEPSEEK_V3 = dataclasses.replace(
    DEEPSEEK_V2,
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    build=_read_v3,
    keys=known.DEEPSEEK_V3,
    write=_write_v3,
    without=without_lookahead,
    aliases=("kimi_k2",),
)
