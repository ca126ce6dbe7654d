"""Switch Transformers and NLLB-MoE."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from moe_jax import routing
from moe_jax.interop.huggingface.entries import Entry, Matrix, Same, Whole
from moe_jax.interop.huggingface.family import (
    ACTIVATIONS,
    Family,
    Json,
    activation,
    network,
    refuse,
)
from moe_jax.models import EncoderDecoderConfig
from moe_jax.nn.attention import Details
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.norm import NormConfig
from moe_jax.nn.positions import Sinusoidal, T5Relative

_T5 = {"up": "wi", "down": "wo"}
_FAIRSEQ = {"up": "fc1", "down": "fc2"}


def _moe(layers: tuple[int, ...], experts: int, width: int, router: routing.Router) -> MoEConfig:
    return MoEConfig(
        layers=layers,
        every=0,
        num_experts=experts,
        expert_dim=width,
        router=router,
        transport="gather",
    )


def _read_switch(config: Json) -> EncoderDecoderConfig:
    refuse(config, is_gated_act=False, router_bias=False, add_router_probs=False)
    router = routing.preset("switch")

    def moe(stack: str, layers: int) -> MoEConfig:
        sparse = config[f"num_sparse_{stack}_layers"]
        step = config.get(f"{stack}_sparse_step") or (layers // sparse if sparse else 0)
        chosen = tuple(i for i in range(layers) if step and (i % step == 1 or step == 1))
        return _moe(chosen, config["num_experts"], config["d_ff"], router)

    tied = config.get("tie_word_embeddings", True)
    return EncoderDecoderConfig(
        encoder_layers=config["num_layers"],
        decoder_layers=config.get("num_decoder_layers") or config["num_layers"],
        width=config["d_model"],
        num_heads=config["num_heads"],
        head_dim=config["d_kv"],
        mlp_dim=config["d_ff"],
        activation=activation(config.get("dense_act_fn", "relu")),
        positions=T5Relative(
            config["relative_attention_num_buckets"],
            config.get("relative_attention_max_distance", 128),
        ),
        attention=Details(scale=1.0),
        norm=NormConfig(eps=config["layer_norm_epsilon"]),
        tie_embeddings=tied,
        scale_embedding=False,
        scale_head=tied,
        encoder_moe=moe("encoder", config["num_layers"]),
        decoder_moe=moe("decoder", config["num_decoder_layers"]),
    )


def _write_switch(config: EncoderDecoderConfig) -> Json:
    act = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    encoder = config.encoder_moe.moe_layers(config.encoder_layers)
    decoder = config.decoder_moe.moe_layers(config.decoder_layers)
    return {
        "num_layers": config.encoder_layers,
        "num_decoder_layers": config.decoder_layers,
        "d_model": config.width,
        "num_heads": config.num_heads,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_dim,
        "dense_act_fn": act[config.activation],
        "feed_forward_proj": act[config.activation],
        "relative_attention_num_buckets": config.positions.buckets,
        "relative_attention_max_distance": config.positions.max_distance,
        "layer_norm_epsilon": config.norm.eps,
        "tie_word_embeddings": config.tie_embeddings,
        "num_experts": config.encoder_moe.num_experts,
        "num_sparse_encoder_layers": len(encoder),
        "num_sparse_decoder_layers": len(decoder),
    }


def _switch_attention(theirs: str, ours: str) -> Iterator[Entry]:
    for letter, name in (("q", "query"), ("k", "key"), ("v", "value")):
        yield Entry(f"{theirs}.{letter}.weight", (f"{ours}.{name}",), Matrix())
    yield Entry(f"{theirs}.o.weight", (f"{ours}.output",), Matrix(2))


def _switch_entries(config: EncoderDecoderConfig) -> Iterator[Entry]:
    yield Entry("shared.weight", ("embedding.table",), Whole())
    if not config.tie_embeddings:
        yield Entry("lm_head.weight", ("embedding.head",), Matrix())
    yield from _switch_stack(config, "encoder", config.encoder_moe, config.encoder_layers, 1)
    yield from _switch_stack(config, "decoder", config.decoder_moe, config.decoder_layers, 2)


def _switch_stack(
    config: EncoderDecoderConfig, stack: str, moe: MoEConfig, layers: int, last: int
) -> Iterator[Entry]:
    final = {"encoder": "encoder_norm", "decoder": "final_norm"}[stack]
    first = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    yield Entry(first, (f"{stack}_bias.table",), Whole())
    yield Entry(f"{stack}.final_layer_norm.weight", (f"{final}.scale",), Same())
    for i in range(layers):
        block, ours = f"{stack}.block.{i}.layer", f"{stack}.{i}"
        yield from _switch_attention(f"{block}.0.SelfAttention", f"{ours}.attention")
        yield Entry(f"{block}.0.layer_norm.weight", (f"{ours}.attention_norm.scale",), Same())
        if last == 2:
            yield from _switch_attention(f"{block}.1.EncDecAttention", f"{ours}.cross")
            yield Entry(f"{block}.1.layer_norm.weight", (f"{ours}.cross_norm.scale",), Same())
        name = f"{block}.{last}.layer_norm.weight"
        yield Entry(name, (f"{ours}.feed_forward_norm.scale",), Same())
        inner, mlp = f"{ours}.feed_forward", f"{block}.{last}.mlp"
        if i not in moe.moe_layers(layers):
            yield from network(mlp, inner, _T5)
            continue
        yield Entry(f"{mlp}.router.classifier.weight", (f"{inner}.router.kernel",), Matrix())
        for e in range(moe.num_experts):
            yield from network(f"{mlp}.experts.expert_{e}", f"{inner}.experts", _T5, f"|{e}")


def _read_nllb(config: Json) -> EncoderDecoderConfig:
    refuse(config, router_bias=False, second_expert_policy="all")
    router = routing.preset(
        "fairseq_top2",
        second="all",
        pad_mask=True,
        normalize_before_dropping=config.get("normalize_router_prob_before_dropping", False),
        batch_prioritized=config.get("batch_prioritized_routing", False),
    )

    def moe(stack: str) -> MoEConfig:
        step, layers = config[f"{stack}_sparse_step"], config[f"{stack}_layers"]
        chosen = tuple(i for i in range(layers) if step and (i + 1) % step == 0)
        found = _moe(chosen, config["num_experts"], config[f"{stack}_ffn_dim"], router)
        return dataclasses.replace(found, expert_mask=config["moe_token_dropout"])

    return EncoderDecoderConfig(
        encoder_layers=config["encoder_layers"],
        decoder_layers=config["decoder_layers"],
        width=config["d_model"],
        num_heads=config["encoder_attention_heads"],
        head_dim=config["d_model"] // config["encoder_attention_heads"],
        mlp_dim=config["encoder_ffn_dim"],
        activation=activation(config["activation_function"]),
        mlp_bias=True,
        positions=Sinusoidal(offset=config["pad_token_id"] + 1),
        attention=Details(qkv_bias=True, output_bias=True),
        norm=NormConfig("layer", 1e-5, bias=True),
        tie_embeddings=True,
        scale_embedding=config.get("scale_embedding", True),
        encoder_moe=moe("encoder"),
        decoder_moe=moe("decoder"),
    )


def _write_nllb(config: EncoderDecoderConfig) -> Json:
    act = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    router = config.encoder_moe.router
    found = {
        "d_model": config.width,
        "activation_function": act[config.activation],
        "scale_embedding": config.scale_embedding,
        "pad_token_id": config.positions.offset - 1,
        "num_experts": config.encoder_moe.num_experts,
        "moe_token_dropout": config.encoder_moe.expert_mask,
        "second_expert_policy": router.select.second,
        "normalize_router_prob_before_dropping": router.select.normalize,
        "batch_prioritized_routing": router.capacity.priority == "score",
    }
    for stack in ("encoder", "decoder"):
        moe, layers = getattr(config, f"{stack}_moe"), getattr(config, f"{stack}_layers")
        sparse = moe.moe_layers(layers)
        found |= {
            f"{stack}_layers": layers,
            f"{stack}_attention_heads": config.num_heads,
            f"{stack}_ffn_dim": config.mlp_dim,
            f"{stack}_sparse_step": sparse[0] + 1 if sparse else 0,
        }
    return found


def _with_biases(entries: Iterator[Entry]) -> Iterator[Entry]:
    """Yields matrices and, after each, its bias."""
    for entry in entries:
        yield entry
        name, _, index = entry.ours[0].partition("|")
        ours = f"{name}_bias" + (f"|{index}" if index else "")
        yield Entry(entry.theirs.removesuffix("weight") + "bias", (ours,), Same())


def _nllb_attention(theirs: str, ours: str) -> Iterator[Entry]:
    for letter, name in (("q", "query"), ("k", "key"), ("v", "value")):
        yield Entry(f"{theirs}.{letter}_proj.weight", (f"{ours}.{name}",), Matrix())
    yield Entry(f"{theirs}.out_proj.weight", (f"{ours}.output",), Matrix(2))


def _layer_norm(theirs: str, ours: str) -> Iterator[Entry]:
    yield Entry(f"{theirs}.weight", (f"{ours}.scale",), Same())
    yield Entry(f"{theirs}.bias", (f"{ours}.bias",), Same())


def _nllb_entries(config: EncoderDecoderConfig) -> Iterator[Entry]:
    yield Entry("model.shared.weight", ("embedding.table",), Whole())
    yield from _nllb_stack("encoder", config.encoder_moe, config.encoder_layers)
    yield from _nllb_stack("decoder", config.decoder_moe, config.decoder_layers)


def _nllb_stack(stack: str, moe: MoEConfig, layers: int) -> Iterator[Entry]:
    final = {"encoder": "encoder_norm", "decoder": "final_norm"}[stack]
    yield from _layer_norm(f"model.{stack}.layer_norm", final)
    for i in range(layers):
        layer, ours = f"model.{stack}.layers.{i}", f"{stack}.{i}"
        yield from _with_biases(_nllb_attention(f"{layer}.self_attn", f"{ours}.attention"))
        yield from _layer_norm(f"{layer}.self_attn_layer_norm", f"{ours}.attention_norm")
        if stack == "decoder":
            yield from _with_biases(_nllb_attention(f"{layer}.cross_attention", f"{ours}.cross"))
            yield from _layer_norm(f"{layer}.cross_attention_layer_norm", f"{ours}.cross_norm")
        yield from _layer_norm(f"{layer}.ff_layer_norm", f"{ours}.feed_forward_norm")
        inner = f"{ours}.feed_forward"
        if i not in moe.moe_layers(layers):
            yield from _with_biases(network(f"{layer}.ffn", inner, _FAIRSEQ))
            continue
        name = f"{layer}.ffn.router.classifier.weight"
        yield Entry(name, (f"{inner}.router.kernel",), Matrix())
        for e in range(moe.num_experts):
            theirs, experts = f"{layer}.ffn.experts.expert_{e}", f"{inner}.experts"
            yield from _with_biases(network(theirs, experts, _FAIRSEQ, f"|{e}"))


SWITCH = Family(
    "switch_transformers",
    "SwitchTransformersForConditionalGeneration",
    _read_switch,
    _write_switch,
    _switch_entries,
    ignored=("embed_tokens.weight", "lm_head.weight"),
)
NLLB_MOE = Family(
    "nllb-moe",
    "NllbMoeForConditionalGeneration",
    _read_nllb,
    _write_nllb,
    _nllb_entries,
    ignored=("embed_tokens.weight", "lm_head.weight", "embed_positions.weights"),
)
