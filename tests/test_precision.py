"""Products that claim float32 say so in the lowered program, forward and backward.

An accelerator multiplies float32 tensors in bfloat16 or TF32 where a program says ``DEFAULT``. The
programs are lowered and never compiled, so no accelerator is needed to read them.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import decoding, routing
from moe_jax.config.optimizer import OptimizerConfig
from moe_jax.decoding import Sampling
from moe_jax.models import Decoder, DecoderConfig, EncoderDecoder, EncoderDecoderConfig
from moe_jax.models.embedding import Embedding
from moe_jax.nn.latent import Latent
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.positions import T5Relative
from moe_jax.nn.router import RouterLayer
from moe_jax.nn.shared import SharedConfig
from moe_jax.parallel import MeshConfig, make_mesh
from moe_jax.precision import wide_einsum
from moe_jax.routing import Forced
from moe_jax.routing.capacity import exclusive_cumsum
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import Recipe
from moe_jax.training.step import Objective, Teacher
from moe_jax.transport import Einsum

# No two sizes are equal, so that a product is known by its shape.
ROWS, LENGTH, WIDTH, HEADS, VOCAB, E = 2, 12, 20, 4, 29, 16
DOT = re.compile(
    r"stablehlo\.dot_general .*?(?:precision = \[(\w+), \w+\])?"
    r" : \(tensor<(\S*)>, tensor<(\S*)>\) -> tensor<(\S*)>"
)


def products(function, *arguments) -> list[tuple[str, str, str, str]]:
    """Returns precision, both operands and result of every product in a lowered program."""
    text = jax.jit(function).lower(*arguments).as_text()
    found = DOT.findall(text)
    assert len(found) == text.count("stablehlo.dot_general") > 0
    return [(precision or "DEFAULT", *types) for precision, *types in found]


def rounded(found):
    """Returns the products that an accelerator may compute on fewer bits than they were given."""
    return [
        (precision, *types)
        for precision, *types in found
        if precision != "HIGHEST" and not all(t.endswith("bf16") for t in types[:2])
    ]


# ---------------------------------------------------------------- routers


def router_products(router, dtype=jnp.bfloat16):
    """Returns the products of a router, forward and backward, for tokens of ``dtype``."""
    layer = jax.eval_shape(lambda: RouterLayer(router, WIDTH, E, jax.random.key(0), 1.0))
    fixed = router.select.slots()
    record = jnp.zeros((1, LENGTH, 1), jnp.int32) if isinstance(router.select, Forced) else None

    def objective(layer, x, key):
        plan, _ = layer(
            x,
            capacity=LENGTH if fixed is None else fixed,
            valid=jnp.ones(x.shape[:2], bool),
            token_ids=jnp.zeros(x.shape[:2], jnp.int32),
            record=record,
            rng=key,
        )
        return plan.combine.sum() + sum(loss.sum() for loss in plan.losses.values())

    gradient = jax.value_and_grad(objective, (0, 1))
    x = jax.ShapeDtypeStruct((1, LENGTH, WIDTH), dtype)
    return products(gradient, layer, x, jax.random.key(1))


LEARNED = [
    function.__name__
    for function in routing.presets.PRESETS
    if function().head.parameters(WIDTH, E, function().planes)
]


@pytest.mark.parametrize("name", LEARNED)
def test_every_router_multiplies_in_float32_forward_and_backward(name):
    found = router_products(routing.preset(name))
    # Logits, and the gradients of tokens and of weights.
    assert len(found) >= 3
    assert not rounded(found)
    assert not any("bf16" in kind for _, *kinds in found for kind in kinds)


def of_tokens(found):
    """Returns the products that read tokens ``(1, L, M)``."""
    return [one for one in found if one[1].startswith(f"1x{LENGTH}x{WIDTH}x")]


@pytest.mark.parametrize(
    ("precision", "read", "given"),
    [("float32", "f32", "f32"), ("bfloat16_product", "bf16", "f32"), ("input", "bf16", "bf16")],
)
@pytest.mark.parametrize("jitter", [0.0, 0.01])
def test_the_arms_of_switch_table_2_compute_as_they_are_named(precision, read, given, jitter):
    router = routing.preset("switch", precision=precision, input_jitter=jitter)
    found = of_tokens(router_products(router))
    assert found and all(kinds[0].endswith(f"x{read}") for _, *kinds in found)
    assert all(one[0] == "HIGHEST" for one in found) == (precision == "float32")
    layer = RouterLayer(router, WIDTH, E, jax.random.key(0), 1.0)
    x = jnp.ones((1, LENGTH, WIDTH), jnp.bfloat16)
    assert layer.logits(x).dtype == {"f32": jnp.float32, "bf16": jnp.bfloat16}[given]


def test_a_float32_layer_has_a_float32_router_by_either_name():
    for precision in ("float32", "input"):
        found = router_products(routing.preset("switch", precision=precision), jnp.float32)
        assert {one[0] for one in found} == {"HIGHEST"}


def test_a_bfloat16_product_loses_what_float32_keeps():
    # 1 + 1/512 has nine bits after the point and bfloat16 seven: it becomes 1.
    x, kernel = jnp.full((1, 1, 1), 1 + 1 / 512), jnp.ones((1, 1))
    for precision, expected in (("float32", 1 + 1 / 512), ("bfloat16_product", 1.0)):
        layer = RouterLayer(
            routing.preset("switch", precision=precision), 1, 1, jax.random.key(0), 1.0
        )
        layer.kernel[...] = kernel
        assert layer.logits(x).dtype == jnp.float32
        assert layer.logits(x)[0, 0, 0] == expected


def test_counts_of_a_queue_are_exact_products():
    found = products(exclusive_cumsum, jax.ShapeDtypeStruct((200, E), jnp.float32))
    assert not rounded(found)


@pytest.mark.parametrize("step", ["dispatch", "combine"])
def test_the_einsum_transport_moves_float32_tokens_whole(step):
    # A transport that gathers moves every bit of a token, so a product with ones must too.
    router, valid = routing.preset("switch"), jnp.ones((1, 4), bool)
    route = functools.partial(routing.route, router, capacity=2, valid=valid)
    plan = jax.eval_shape(route, jax.ShapeDtypeStruct((1, 4, 2), jnp.float32))
    shape = {"dispatch": (1, 4, 3), "combine": (1, 2, 2, 3)}[step]

    def gradient(x, plan):
        return jax.value_and_grad(lambda x: getattr(Einsum(), step)(x, plan).sum())(x)

    for dtype, precision in ((jnp.float32, "HIGHEST"), (jnp.bfloat16, "DEFAULT")):
        found = products(gradient, jax.ShapeDtypeStruct(shape, dtype), plan)
        assert len(found) == 2 and {one[0] for one in found} == {precision}


# ---------------------------------------------------------------- models


def moe(**settings):
    router = routing.preset("gshard")
    return MoEConfig(
        every=2, num_experts=E, expert_dim=8, group_size=LENGTH, router=router, **settings
    )


PLAIN = DecoderConfig(
    num_layers=2,
    width=WIDTH,
    num_heads=HEADS,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=10,
    compute_dtype="bfloat16",
    moe=moe(),
)
LATENT = Latent(query_rank=8, kv_rank=6, plain_dim=4, rotary_dim=4, value_dim=5)
ENCODER = EncoderDecoderConfig(
    encoder_layers=2,
    decoder_layers=2,
    width=WIDTH,
    num_heads=HEADS,
    head_dim=6,
    mlp_dim=10,
    compute_dtype="bfloat16",
    encoder_moe=moe(),
    decoder_moe=moe(),
)
MODELS = {
    "gather": PLAIN,
    "einsum": dataclasses.replace(PLAIN, moe=moe(transport="einsum")),
    "ragged": dataclasses.replace(PLAIN, moe=moe(transport="ragged")),
    "own head, T5": dataclasses.replace(PLAIN, tie_embeddings=False, positions=T5Relative(8, 12)),
    "latent": dataclasses.replace(PLAIN, attention=LATENT),
    "lookahead": dataclasses.replace(PLAIN, lookahead=1),
    "shared": dataclasses.replace(PLAIN, moe=moe(shared=SharedConfig(8, "sigmoid"))),
    "encoder-decoder": ENCODER,
}


def abstract(config):
    optimizer = make_optimizer(OptimizerConfig(), 20)
    mesh = make_mesh(MeshConfig(1), jax.devices()[:1])
    graph, state = Recipe(config, VOCAB, optimizer, 0, mesh).abstract()
    # Without shardings, as a program for one device of any kind.
    return graph, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def batch():
    names = ("inputs", "targets", "segments", "positions", "encoder_inputs", "encoder_segments")
    return {name: jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32) for name in names}


def training_products(config, *, distilled=False, loss_chunk=0):
    graph, state = abstract(config)
    teacher = Teacher(graph, state.params, state.router_state) if distilled else None
    objective = Objective(loss_chunk=loss_chunk, teacher_weight=0.5 if distilled else None)

    def gradient(state, batch, teacher):
        return objective.value_and_gradient(graph, state, batch, teacher)

    return products(gradient, state, batch(), teacher)


def results(found, last):
    """Returns the types of results whose shape ends with the expression ``last``."""
    shaped = re.compile(f"x{last}x")
    return [kinds[2].rsplit("x", 1)[1] for _, *kinds in found if shaped.search(f"x{kinds[2]}")]


# Scores of one query head per head of keys, or of two.
SCORES = rf"(?:{HEADS}x1|2x{HEADS // 2})x{LENGTH}x{LENGTH}"


@pytest.mark.parametrize("name", MODELS)
def test_no_float32_tensor_of_a_bfloat16_model_is_rounded_in_a_product(name):
    found = training_products(MODELS[name])
    assert not rounded(found)
    # Logits and scores of the forward pass; the backward pass has the scores' gradient in bfloat16.
    logits = [one for one in found if one[3].endswith(f"{LENGTH}x{VOCAB}xf32")]
    assert len(logits) == 1 + (name == "lookahead")
    assert not any(one[3].endswith(f"{LENGTH}x{VOCAB}xbf16") for one in found)
    # The products of the forward pass, and their gradients.
    scores = results(found, SCORES)
    assert 0 < scores.count("f32") == scores.count("bf16")


@pytest.mark.parametrize("options", [{"distilled": True}, {"loss_chunk": 4}], ids=str)
def test_heads_of_a_teacher_and_of_chunks_give_float32(options):
    found = training_products(PLAIN, **options)
    assert not rounded(found)
    length = options.get("loss_chunk", LENGTH)
    logits = [one[3] for one in found if one[3].endswith(f"{length}x{VOCAB}xf32")]
    assert len(logits) >= 1 + options.get("distilled", False)


@pytest.mark.parametrize("config", [PLAIN, MODELS["latent"], ENCODER], ids=["", "latent", "T5"])
def test_a_cache_changes_no_precision(config):
    kind = EncoderDecoder if config is ENCODER else Decoder
    model = jax.eval_shape(lambda: kind(config, VOCAB, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    sampling = Sampling(tokens=3)
    if config is ENCODER:
        found = products(lambda *x: decoding._translate(*x, sampling, 0), model, tokens, tokens)
    else:
        found = products(lambda *x: decoding._generate(*x, sampling), model, tokens, tokens)
    assert not rounded(found)
    assert [one[3] for one in found].count(f"{ROWS}x1x{VOCAB}xf32") == 1
    assert not any(f"x{VOCAB}xbf16" in one[3] for one in found)


def test_networks_of_a_float32_model_have_the_default_precision():
    # Router, head and attention's two products are exact; a user's setting decides for the rest.
    config = dataclasses.replace(PLAIN, compute_dtype="float32")
    defaults = [one for one in training_products(config) if one[0] == "DEFAULT"]
    assert defaults
    for _, *kinds in defaults:
        assert not any(f"x{VOCAB}x" in f"x{kind}" for kind in kinds)
        assert not any(re.search(SCORES, kind) for kind in kinds)
    with jax.default_matmul_precision("highest"):
        assert not rounded(training_products(config))


# ---------------------------------------------------------------- values


def test_a_head_in_bfloat16_gives_logits_that_bfloat16_cannot_hold():
    # 19 + 1/16: between 16 and 32 the numbers of bfloat16 are 1/8 apart.
    config = dataclasses.replace(PLAIN, width=2, tie_embeddings=False)
    head = Embedding(config, 1, jax.random.key(0), jax.random.key(1))
    head.head[...] = jnp.array([[19.0], [1 / 16]])
    logits = head.logits(jnp.ones((1, 1, 2), jnp.bfloat16))
    assert logits.dtype == jnp.float32
    assert logits[0, 0, 0] == 19.0625


def test_a_wide_product_has_the_gradients_of_a_plain_one():
    x, y = (
        jax.random.normal(jax.random.key(0), (2, 3, 4)),
        jax.random.normal(jax.random.key(1), (4, 5)),
    )
    weights = jnp.arange(30.0).reshape(2, 3, 5)

    def value(product, x, y):
        return (product("abm,mc->abc", x, y) * weights).sum()

    for dtype in (jnp.float32, jnp.bfloat16):
        given = x.astype(dtype), y.astype(dtype)
        found = jax.grad(value, (1, 2))(wide_einsum, *given)
        wanted = jax.grad(value, (1, 2))(jnp.einsum, *(a.astype(jnp.float32) for a in given))
        for one, other in zip(found, wanted, strict=True):
            assert one.dtype == dtype
            bound = 1e-6 if dtype == jnp.float32 else 2e-2
            np.testing.assert_allclose(one.astype(jnp.float32), other, rtol=bound, atol=bound)
