"""Counts the parameters and FLOPs of a model on the real module, without allocating it."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Literal

import jax
from flax import nnx

from moe_jax import models
from moe_jax.models.config import Tokens
from moe_jax.models.stack import Stack
from moe_jax.nn.attention import AttentionConfig, Details
from moe_jax.nn.block import Block
from moe_jax.nn.latent import LatentConfig
from moe_jax.nn.moe import ConfiguredMoE
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.transport import implementation

Convention = Literal["exact", "kaplan", "full", "computed"]
PARTS = ("attention", "dense", "experts", "router", "head")
_NO_PRODUCT = ("scale", "expert_scale", "sinks", "places", "query_norm", "key_norm")


@dataclasses.dataclass(frozen=True)
class Cost:
    """The parameters and FLOPs of a model.

    Attributes:
        total: Number of parameters without lookahead modules, which papers count separately.
        lookahead: Number of parameters of the lookahead modules, which only training needs.
        experts: Number of experts, summed over all layers.
        active: Number of parameters that process one token, embedding and head included.
        input_embedding: Number of parameters of the embedding that the head does not share.
        parameters: Number of parameters by part, summing to ``total``; a norm belongs to the part
            that follows it. Shared experts, and projections to a latent space of the experts,
            process every token and are dense.
        flops_by_part: FLOPs of the forward pass per token by part; a multiply-add is two FLOPs.
        lookahead_flops: FLOPs of the lookahead modules in the forward pass per token.
        score_flops: FLOPs of the layers' scores and of the sums of values by them, per token, which
            are a part of attention's.
        tokens: Length of the sequence for which FLOPs are counted.
    """

    total: int
    experts: int
    active: int
    input_embedding: int
    parameters: dict[str, int]
    flops_by_part: dict[str, int]
    lookahead: int
    lookahead_flops: int
    score_flops: int
    tokens: Tokens

    @property
    def flops_per_token(self) -> int:
        """FLOPs of the forward pass per token, averaged over the sequence."""
        return sum(self.flops_by_part.values())

    @property
    def training_flops_per_token(self) -> int:
        """FLOPs of forward and backward pass per token: three times forward, with lookahead."""
        return 3 * (self.flops_per_token + self.lookahead_flops)

    @property
    def flops_per_sequence(self) -> int:
        """FLOPs of the forward pass of the whole sequence."""
        return self.flops_per_token * (self.tokens.inputs + self.tokens.targets)

    @property
    def active_by_convention(self) -> dict[str, int]:
        """Active parameters by the conventions of published models.

        ``embedding_and_head`` counts both (Mixtral, DBRX, OLMoE, Qwen), ``no_input_embedding``
        excludes the input embedding (DeepSeek-V3, gpt-oss), and ``one_matrix`` counts one matrix of
        the vocabulary, tied or not (GLaM).
        """
        alone = self.active - self.input_embedding
        return {
            "embedding_and_head": self.active,
            "no_input_embedding": alone,
            "one_matrix": alone,
        }


@functools.lru_cache
def count(
    config: models.ModelConfig,
    vocab_size: int,
    tokens: int | Tokens,
    convention: Convention = "exact",
) -> Cost:
    """Returns the parameters and FLOPs of a model, adapters left out.

    Args:
        config: Configuration of the model.
        vocab_size: ``V``.
        tokens: Length of the sequence; a number suffices for a decoder.
        convention: Convention for FLOPs. ``exact`` counts unmasked attention scores. ``kaplan``
            counts half of all attention scores, the keys and values of a memory once per target
            token, and no router (Kaplan et al. 2020, 2001.08361; Switch table 9). ``full`` also
            counts masked scores (DeepSeekMoE). ``computed`` also counts every slot of every expert,
            filled or empty, as the program computes them.
    """
    tokens = Tokens(tokens) if isinstance(tokens, int) else tokens
    config = dataclasses.replace(config, lora=None)
    model = jax.eval_shape(lambda: models.make(config, vocab_size, jax.random.key(0)))
    parameters = dict.fromkeys(PARTS, 0)
    flops = dict.fromkeys(PARTS, 0.0)
    idle, experts, scores = 0.0, 0, 0.0
    for stack, own, memory, causal in _stacks(model, tokens):
        for block, repeats in _blocks(stack):
            for part, size in _sizes(block).items():
                parameters[part] += size * repeats
            for part, spent in _flops(block, own, memory, causal, convention).items():
                flops[part] += spent * own * repeats
            idle += _idle(block) * repeats
            scores += _scores(block, own, causal, convention) * own * repeats
            experts += sum(moe.num_experts for moe in block.config.mixtures) * repeats
    head = config.width * vocab_size
    embedding = _size(model.embedding)
    last = tokens.targets or tokens.inputs
    flops["head"] = 2.0 * head * last
    parameters |= {"head": head, "embedding": embedding - head}
    further, further_flops = _lookahead(model, tokens, convention)
    total = _size(model) - further
    parameters["final_norms"] = total - sum(parameters.values())
    everything = tokens.inputs + tokens.targets
    per_token = {part: round(spent / everything) for part, spent in flops.items()}
    return Cost(
        total=total,
        experts=experts,
        active=round(total - idle),
        input_embedding=0 if config.tie_embeddings else head,
        parameters=parameters,
        flops_by_part=per_token,
        lookahead=further,
        lookahead_flops=round(further_flops),
        score_flops=round(scores / everything),
        tokens=tokens,
    )


def _lookahead(model: models.Model, tokens: Tokens, convention: Convention) -> tuple[int, float]:
    """Returns parameters and FLOPs per token of the lookahead modules, which share the head."""
    if not isinstance(model, models.Decoder) or not model.config.lookahead:
        return 0, 0.0
    flops = 2.0 * len(model.lookahead) * math.prod(model.embedding.table.shape)
    for module in model.lookahead:
        flops += 2 * math.prod(module.merge.shape)
        ((block, _),) = _blocks(module.layers)
        flops += sum(_flops(block, tokens.inputs, 0, True, convention).values())
    return _size(model.lookahead), flops


def _stacks(model: models.Model, tokens: Tokens) -> Iterator[tuple[Stack, int, int, bool]]:
    """Yields each stack, its tokens, the tokens of its memory, and whether it is causal."""
    if isinstance(model, models.Decoder):
        yield model.layers, tokens.inputs, 0, model.config.causal
    else:
        yield model.encoder, tokens.inputs, 0, False
        yield model.decoder, tokens.targets, tokens.inputs, True


def _blocks(stack: Stack) -> Iterator[tuple[Block, int]]:
    """Yields one layer of every kind of block, and the number of layers of the kind."""
    layers = list(stack.layers())
    repeats = collections.Counter(layer.path for layer in layers)
    for layer in {layer.path: layer for layer in layers}.values():
        yield jax.eval_shape(layer.take, layer.block), repeats[layer.path]


def _leaves(module: nnx.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        yield str(path[-1]), leaf.get_value().shape


def _size(module: nnx.Module) -> int:
    return sum(math.prod(shape) for _, shape in _leaves(module))


def _products(module: nnx.Module) -> int:
    """Returns the multiply-adds per token, which are the parameters of linear maps."""
    return sum(
        math.prod(shape)
        for name, shape in _leaves(module)
        if name not in _NO_PRODUCT and not name.endswith("bias")
    )


def _sizes(block: Block) -> dict[str, int]:
    inner = block.feed_forward
    found = {"attention": _branches(block, "attention", "cross"), "router": 0, "experts": 0}
    found["dense"] = _branches(block, "extra") + _attributes(block, _norms("feed_forward"))
    found["dense"] += int(block.config.output_scale)
    for mixture in _mixtures(block):
        found["router"] += _size(mixture.router) + _attributes(mixture, ["free"])
        found["experts"] += _size(mixture.experts)
        found["dense"] += _attributes(mixture, ["shared", "latent"])
    if not isinstance(inner, ConfiguredMoE):
        found["dense"] += _size(inner)
    return found


def _branches(block: Block, *names: str) -> int:
    """Returns the number of parameters of residual branches with their norms."""
    return sum(_attributes(block, [name, *_norms(name)]) for name in names)


def _norms(branch: str) -> list[str]:
    """Returns the names of the norms of a residual branch."""
    return [f"{branch}_norm", f"{branch}_output_norm"]


def _mixtures(block: Block) -> list[ConfiguredMoE]:
    parts = (getattr(block, "attention_experts", None), block.feed_forward)
    return [part for part in parts if isinstance(part, ConfiguredMoE)]


def _attributes(module: nnx.Module, names: list[str]) -> int:
    return sum(_size(getattr(module, name)) for name in names if hasattr(module, name))


def _idle(block: Block) -> float:
    """Returns the mean number of expert parameters that do not process a token."""
    return sum(
        _size(mixture.experts) * (1 - _met(mixture.config) / mixture.config.num_experts)
        for mixture in _mixtures(block)
    )


def _met(moe: MoEConfig) -> float:
    """Returns the mean number of experts per token; the capacity sets it if experts choose."""
    return moe.router.experts_per_token(moe.group_size, moe.num_experts)


def _computing(moe: MoEConfig, convention: Convention) -> float:
    """Returns the mean number of experts that compute for a token."""
    if convention != "computed" or implementation(moe).cost.computes == "choices":
        return _met(moe)
    slots = moe.router.slots(moe.group_size, moe.num_experts, train=True)
    return slots * moe.num_experts / moe.group_size


def _flops(
    block: Block, own: int, memory: int, causal: bool, convention: Convention
) -> dict[str, float]:
    """Returns the FLOPs by part of one layer, per token of its stack."""
    inner = block.feed_forward
    attention = 2 * _products(block.attention) + _scores(block, own, causal, convention)
    if memory:
        attention += _cross_flops(block, own, memory, convention)
    dense = 2 * _products(block.extra) if hasattr(block, "extra") else 0.0
    if not isinstance(inner, ConfiguredMoE):
        dense += 2 * _products(inner)
    experts = router = 0.0
    for mixture in _mixtures(block):
        for part in ("shared", "latent"):
            dense += 2 * _products(getattr(mixture, part)) if hasattr(mixture, part) else 0
        share = _computing(mixture.config, convention) / mixture.config.num_experts
        experts += 2 * _products(mixture.experts) * share
        router += 0.0 if convention == "kaplan" else 2 * _products(mixture.router)
        if hasattr(mixture, "free"):
            router += 2 * _products(mixture.free)
    return {"attention": attention, "dense": dense, "experts": experts, "router": router}


def _scores(block: Block, own: int, causal: bool, convention: Convention) -> float:
    """Returns the FLOPs of the scores and of the sums of values, per token."""
    attention = block.config.attention
    return 2 * attention.score_dims * _seen(attention, own, causal, convention)


def _cross_flops(block: Block, own: int, memory: int, convention: Convention) -> float:
    cross = block.config.cross_attention
    assert cross is not None, "a stack with a memory has cross-attention"
    seen = memory / 2 if convention == "kaplan" else memory
    spent = 2 * _products(block.cross) + 2 * cross.score_dims * seen
    if convention == "kaplan":
        return spent
    keys_and_values = 2 * 2 * cross.width * cross.num_kv_heads * cross.head_dim
    return spent + keys_and_values * (memory - own) / own


def _seen(
    attention: AttentionConfig | LatentConfig, own: int, causal: bool, convention: Convention
) -> float:
    """Returns the mean number of keys per query."""
    if convention in ("full", "computed") or (convention == "exact" and not causal):
        return own
    details = attention.details if isinstance(attention, AttentionConfig) else Details()
    if convention == "exact" and 0 < details.window < own:
        return details.window - details.window**2 / (2 * own)
    if convention == "exact" and 0 < details.chunk < own:
        return details.chunk / 2
    return own / 2
