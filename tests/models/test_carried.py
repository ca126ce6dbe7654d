"""Values that pass from the router of one MoE layer to the next, through stacks of all kinds."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import routing
from moe_jax.attend import View
from moe_jax.errors import ConfigError
from moe_jax.models import Decoder, DecoderConfig, EncoderDecoder, EncoderDecoderConfig
from moe_jax.models.stack import Stack
from moe_jax.nn.attention_experts import AttentionExpertsConfig
from moe_jax.nn.block import Context
from moe_jax.nn.mode import DECODE, TRAIN
from moe_jax.nn.moe_config import LayerOverride, MoEConfig

WIDTH, E, B, L, VOCAB = 8, 4, 2, 5, 24
KEY = jax.random.key(0)
PLUS_PLUS = routing.preset("moe_plus_plus", constant=1, copy=1, zero=1)
ZAYA = routing.preset("zaya", dim=4)
TOKENS = jax.random.randint(jax.random.key(1), (B, L), 1, VOCAB)
ONES, PLACES = jnp.ones((B, L), jnp.int32), jnp.tile(jnp.arange(L), (B, 1))


def sparse(router: routing.Router, every: int = 1) -> MoEConfig:
    # Groups of 4 among 10 tokens: the last group has padding.
    return MoEConfig(every=every, num_experts=E, expert_dim=6, group_size=4, router=router)


def config(router: routing.Router, layers: int = 3, every: int = 1, **settings) -> DecoderConfig:
    return DecoderConfig(
        num_layers=layers,
        width=WIDTH,
        num_heads=2,
        head_dim=4,
        mlp_dim=12,
        activation="relu",
        moe=sparse(router, every),
        **settings,
    )


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean() + 1e-6)


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max())
    return x / x.sum()


def moe_plus_plus(x: np.ndarray, layer, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Output and logits of one token (2410.07348, equations 1 to 6): FFNs, constant, copy, zero."""
    router, experts, free = layer.router, layer.experts, layer.free
    logits = x @ np.asarray(router.kernel) + before @ np.asarray(router.residual)
    gates, out = softmax(logits), np.zeros_like(x)
    a, b = softmax(x @ np.asarray(free.mix)[:, 0])
    for e in np.argsort(-gates)[:2]:
        if e < E:
            y = np.maximum(x @ np.asarray(experts.up)[e], 0) @ np.asarray(experts.down)[e]
        else:
            y = [a * x + b * np.asarray(free.vector)[0], x, 0 * x][e - E]
        out += gates[e] * y
    return out, logits


def stack_of(made: DecoderConfig) -> Stack:
    """Returns a stack whose attention adds nothing."""
    stack = Stack(made.layers(), KEY, scan=made.scan_layers, remat=made.remat)
    for blocks in stack.parts:
        for block in blocks:
            block.attention.output[...] = 0 * block.attention.output[...]
    return stack


@functools.cache
def expected() -> tuple[np.ndarray, np.ndarray]:
    """Inputs and outputs of dense and MoE layers in turn, three of each, token by token."""
    stack = stack_of(config(PLUS_PLUS, 6, every=2, scan_layers=False))
    x = np.asarray(jax.random.normal(jax.random.key(2), (B, L, WIDTH)))
    out = x.copy()
    for place in np.ndindex(B, L):
        h, logits = out[place].copy(), np.zeros(E + 3)
        for (block,) in stack.parts:
            layer = block.feed_forward
            if hasattr(layer, "router"):
                y, logits = moe_plus_plus(unit(h), layer, logits)
            else:
                y = np.maximum(unit(h) @ np.asarray(layer.up), 0) @ np.asarray(layer.down)
            h = h + y
        out[place] = h
    return x, out


@pytest.mark.parametrize(
    ("scan", "remat"), [(True, "none"), (False, "none"), (True, "full"), (True, "dots")]
)
def test_moe_plus_plus_in_numpy(scan: bool, remat):
    x, wanted = expected()
    stack = stack_of(config(PLUS_PLUS, 6, every=2, scan_layers=scan, remat=remat))
    context = Context(View(ONES, PLACES), ONES > 0, TOKENS)
    y, reports, _ = jax.jit(lambda s, x: s(x, context, mode=DECODE, rng=None))(stack, x)
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4)
    assert all(report.carried is None for report in reports)


def hidden(model: Decoder, mode=DECODE) -> jax.Array:
    return model.hidden(TOKENS, ONES, PLACES, mode=mode)[0]


@pytest.mark.parametrize("router", [PLUS_PLUS, ZAYA], ids=["moe_plus_plus", "zaya"])
def test_a_token_is_decoded_as_in_the_whole_text(router):
    model = Decoder(config(router), VOCAB, KEY)
    cache, parts = model.empty_cache(B, L), []
    for start, stop in ((0, 3), (3, 4), (4, 5)):
        piece = [a[:, start:stop] for a in (TOKENS, ONES, PLACES)]
        part, cache = model.extend(*piece, cache)
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), hidden(model), rtol=1e-4, atol=1e-5)


def learned(gradients: Stack, name: str) -> list[bool]:
    """Returns for each MoE layer of a stack whether a parameter of its router has a gradient."""
    views = [view for view in gradients.layers() if view.block.mixtures]
    found = [getattr(view.block.feed_forward.router, name)[...] for view in views]
    return [bool(np.any(view.take(g) != 0)) for view, g in zip(views, found, strict=True)]


@pytest.mark.parametrize(("router", "name"), [(PLUS_PLUS, "residual"), (ZAYA, "carried_scale")])
def test_the_map_of_every_layer_but_the_first_learns(router, name: str):
    # The first layer of each stack reads zeros: encoder, decoder and a stack without a scan.
    moe = sparse(router)
    made = EncoderDecoderConfig(
        encoder_layers=3,
        decoder_layers=2,
        width=WIDTH,
        num_heads=2,
        head_dim=4,
        mlp_dim=12,
        encoder_moe=moe,
        decoder_moe=moe,
    )

    def objective(model):
        memory, _ = model.encode(TOKENS, ONES, mode=TRAIN)
        y, _ = model.decode(TOKENS, ONES, memory, ONES, mode=TRAIN)
        return jnp.sin(y).sum()

    gradients = jax.jit(jax.grad(objective, allow_int=True))(EncoderDecoder(made, VOCAB, KEY))
    assert learned(gradients.encoder, name) == [False, True, True]
    assert learned(gradients.decoder, name) == [False, True]


def test_other_routers_pass_nothing_on():
    stack = jax.eval_shape(lambda: Decoder(config(routing.preset("mixtral")), VOCAB, KEY)).layers
    assert stack._carried_by_none(jnp.zeros((B, L, WIDTH))) == {}


def test_a_layer_with_another_router_lets_values_pass():
    # Layer 1 of 3 routes as Mixtral; the third layer reads what the first passes on.
    override = LayerOverride(layers=(1,), router=routing.preset("mixtral"))
    made = config(PLUS_PLUS)
    made = dataclasses.replace(made, moe=dataclasses.replace(made.moe, overrides=(override,)))
    model = Decoder(made, VOCAB, KEY)
    gradients = jax.grad(lambda m: jnp.sin(hidden(m)).sum(), allow_int=True)(model)
    first, _, third = (view.block.feed_forward.router for view in gradients.layers.layers())
    assert not np.any(first.residual[...]) and np.any(third.residual[...])


def test_experts_of_the_attention_pass_values_among_themselves():
    router = routing.Router(routing.Softmax(), routing.TopK(1), head=routing.ResidualLinear())
    experts = AttentionExpertsConfig(every=1, num_experts=E, group_size=4, router=router)
    made = config(routing.preset("switch"), attention_experts=experts)
    model = Decoder(made, VOCAB, KEY)
    gradients = jax.grad(lambda m: jnp.sin(hidden(m)).sum(), allow_int=True)(model)
    (block,) = gradients.layers.parts[0]
    found = block.attention_experts.router.residual[...]
    assert [bool(np.any(one)) for one in found] == [False, True, True]


def test_layers_that_pass_different_numbers_are_refused():
    wide = LayerOverride(layers=(1,), num_experts=8)
    made = config(PLUS_PLUS)
    with pytest.raises(ConfigError, match=r"passes 7 values .* router of layer 1 reads 11: give"):
        dataclasses.replace(made, moe=dataclasses.replace(made.moe, overrides=(wide,)))
