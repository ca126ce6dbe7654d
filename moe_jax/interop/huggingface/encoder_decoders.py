"""Switch Transformers and NLLB-MoE: models with an encoder and a decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from moe_jax import routing
from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface import known
from moe_jax.interop.huggingface.entries import Entry, Matrix, Same, Whole
from moe_jax.interop.huggingface.family import (
    ACTIVATIONS,
    Family,
    Json,
    activation,
    expect,
    network,
)
from moe_jax.models import EncoderDecoderConfig
from moe_jax.nn.attention import Details
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.norm import NormConfig
from moe_jax.nn.positions import Sinusoidal, T5Relative
from moe_jax.routing.balance import LoadBalance
from moe_jax.routing.select import Top2

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


def _switch_layers(config: Json, stack: str, layers: int) -> tuple[int, ...]:
    """Returns the layers with experts.

    Without a step, ``transformers`` spreads the sparse layers evenly over the stack. If there are
    none, the step is the number of layers.
    """
    sparse, step = config[f"num_sparse_{stack}_layers"], config[f"{stack}_sparse_step"]
    if step is None:
        step = layers // sparse if sparse else layers
    return tuple(i for i in range(layers) if step and (i % step == 1 or step == 1))


def _read_switch(config: Json) -> EncoderDecoderConfig:
    encoder, tied = config["num_layers"], config["tie_word_embeddings"]
    decoder = config["num_decoder_layers"] or encoder
    router = routing.preset(
        "switch",
        balance_weight=config["router_aux_loss_coef"],
        z_weight=config["router_z_loss_coef"],
        input_jitter=float(config["router_jitter_noise"]),
    )

    def moe(stack: str, layers: int) -> MoEConfig:
        chosen = _switch_layers(config, stack, layers)
        return _moe(chosen, config["num_experts"], config["d_ff"], router)

    return EncoderDecoderConfig(
        encoder_layers=encoder,
        decoder_layers=decoder,
        width=config["d_model"],
        num_heads=config["num_heads"],
        head_dim=config["d_kv"],
        mlp_dim=config["d_ff"],
        activation=activation(config["dense_act_fn"]),
        positions=T5Relative(
            config["relative_attention_num_buckets"],
            config["relative_attention_max_distance"],
        ),
        attention=Details(scale=1.0),
        norm=NormConfig(eps=float(config["layer_norm_epsilon"])),
        tie_embeddings=tied,
        scale_embedding=False,
        scale_head=tied,
        encoder_moe=moe("encoder", encoder),
        decoder_moe=moe("decoder", decoder),
    )


def _write_switch(config: EncoderDecoderConfig) -> Json:
    act = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    encoder = config.encoder_moe.moe_layers(config.encoder_layers)
    decoder = config.decoder_moe.moe_layers(config.decoder_layers)
    positions = expect(config.positions, T5Relative)
    # Without a step, a reader gives layer 1 of a stack of dense layers experts.
    stacks = {"encoder": encoder, "decoder": decoder}
    dense = {f"{stack}_sparse_step": 0 for stack, sparse in stacks.items() if not sparse}
    return {
        "num_layers": config.encoder_layers,
        "num_decoder_layers": config.decoder_layers,
        "d_model": config.width,
        "num_heads": config.num_heads,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_dim,
        "dense_act_fn": act[config.activation],
        "feed_forward_proj": act[config.activation],
        "relative_attention_num_buckets": positions.buckets,
        "relative_attention_max_distance": positions.max_distance,
        "layer_norm_epsilon": config.norm.eps,
        "tie_word_embeddings": config.tie_embeddings,
        "num_experts": (config.encoder_moe if encoder else config.decoder_moe).num_experts,
        "num_sparse_encoder_layers": len(encoder),
        "num_sparse_decoder_layers": len(decoder),
        **dense,
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


def _same_in_both(config: Json) -> None:
    """Rejects an encoder and a decoder of different widths, which the model does not support."""
    for name in ("attention_heads", "ffn_dim"):
        encoder, decoder = (config[f"{stack}_{name}"] for stack in ("encoder", "decoder"))
        if encoder != decoder:
            raise ConfigError(
                f"config.json says encoder_{name}={encoder} and decoder_{name}={decoder}, but "
                "only equal numbers are supported"
            )
    if config["d_model"] % config["encoder_attention_heads"]:
        raise ConfigError(
            f"config.json says d_model={config['d_model']}, which is not a multiple of "
            f"encoder_attention_heads={config['encoder_attention_heads']}"
        )


def _nllb_router(config: Json) -> routing.Router:
    router = routing.preset(
        "fairseq_top2",
        second="all",
        pad_mask=not config["router_ignore_padding_tokens"],
        normalize_before_dropping=config["normalize_router_prob_before_dropping"],
        batch_prioritized=config["batch_prioritized_routing"],
        eval_token_fraction=float(config["moe_eval_capacity_token_fraction"]),
    )
    weight = config["router_aux_loss_coef"]
    balance = (LoadBalance(weight, choices="all"),) if weight else ()
    return dataclasses.replace(router, balance=balance)


def _read_nllb(config: Json) -> EncoderDecoderConfig:
    _same_in_both(config)
    router = _nllb_router(config)

    def moe(stack: str) -> MoEConfig:
        step, layers = config[f"{stack}_sparse_step"], config[f"{stack}_layers"]
        chosen = tuple(i for i in range(layers) if step and (i + 1) % step == 0)
        experts = _moe(chosen, config["num_experts"], config[f"{stack}_ffn_dim"], router)
        return dataclasses.replace(experts, expert_mask=float(config["moe_token_dropout"]))

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
        scale_embedding=config["scale_embedding"],
        encoder_moe=moe("encoder"),
        decoder_moe=moe("decoder"),
    )


def _write_nllb(config: EncoderDecoderConfig) -> Json:
    act = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    router = config.encoder_moe.router
    select = expect(router.select, Top2)
    keys = {
        "d_model": config.width,
        "activation_function": act[config.activation],
        "scale_embedding": config.scale_embedding,
        "pad_token_id": expect(config.positions, Sinusoidal).offset - 1,
        "num_experts": config.encoder_moe.num_experts,
        "moe_token_dropout": config.encoder_moe.expert_mask,
        "second_expert_policy": select.second,
        "normalize_router_prob_before_dropping": select.normalize,
        "batch_prioritized_routing": router.capacity.priority == "score",
    }
    for stack in ("encoder", "decoder"):
        moe, layers = getattr(config, f"{stack}_moe"), getattr(config, f"{stack}_layers")
        sparse = moe.moe_layers(layers)
        keys |= {
            f"{stack}_layers": layers,
            f"{stack}_attention_heads": config.num_heads,
            f"{stack}_ffn_dim": config.mlp_dim,
            f"{stack}_sparse_step": sparse[0] + 1 if sparse else 0,
        }
    return keys


def _with_biases(entries: Iterator[Entry]) -> Iterator[Entry]:
    """Yields the entries of matrices, each followed by the entry of its bias."""
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
    known.SWITCH,
    EncoderDecoderConfig,
    ignored=("EncDecAttention.relative_attention_bias.weight",),
    copies={"shared.weight": ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")},
    tied=("lm_head.weight", "shared.weight"),
    base="",
)
_NLLB_EMBEDDING = "model.shared.weight"
NLLB_MOE = Family(
    "nllb-moe",
    "NllbMoeForConditionalGeneration",
    _read_nllb,
    _write_nllb,
    _nllb_entries,
    known.NLLB_MOE,
    EncoderDecoderConfig,
    ignored=("embed_positions.weights",),
    copies={
        _NLLB_EMBEDDING: ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
    },
    tied=("lm_head.weight", _NLLB_EMBEDDING),
)
