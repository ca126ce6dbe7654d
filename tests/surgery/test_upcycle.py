"""Dense networks as experts: equal logits at the start where the method promises it."""

import dataclasses

import jax
import numpy as np
import pytest

from moe_jax import routing
from moe_jax.errors import ConfigError
from moe_jax.surgery.upcycle import Upcycling, keeps_function, redrawn, upcycle, upcycled_config
from tests.surgery.small import MOE, assert_close, config, logits, two_stacks, weights

KEY = jax.random.key(3)
DENSE = config(every=0)
PAIR = two_stacks(every=0)


def recipe(name="mixtral", experts=8, **changes):
    own = {k: v for k, v in changes.items() if k in ("shards", "layers", "redrawn")}
    rest = {k: v for k, v in changes.items() if k not in own}
    return Upcycling(experts, routing.preset(name, **rest), **own)


@pytest.mark.parametrize(
    ("model", "made"),
    [
        (DENSE, recipe(k=1)),
        (DENSE, recipe(k=2)),
        (dataclasses.replace(DENSE, mlp_bias=True, gated=False), recipe(k=3, layers=(1,))),
        (DENSE, recipe("kimi_k2", k=2)),  # gates sum to 2.827
        (DENSE, recipe("gshard")),
        (dataclasses.replace(DENSE, scan_layers=False), recipe(k=4, shards=2)),
        (dataclasses.replace(DENSE, mlp_bias=True), recipe(k=4, shards=4)),
        (DENSE, recipe("kimi_k2", k=6, shards=3, experts=12)),
        (DENSE, recipe("deepseek_v3", k=4, shards=2, groups=2, keep_groups=2)),
        (dataclasses.replace(DENSE, lookahead=1), recipe(k=2)),
        (PAIR, recipe(k=2)),
        (dataclasses.replace(PAIR, mlp_bias=True), recipe("kimi_k2", k=4, shards=2, layers=(1,))),
        (dataclasses.replace(PAIR, gated=True, scan_layers=False), recipe(layers=("decoder 0",))),
    ],
    ids=(
        *("one", "two", "biases", "scaled", "top2", "parts", "parts_biases", "parts_scaled"),
        *("parts_of_all_groups", "lookahead", "two_stacks", "two_stacks_parts", "one_stack"),
    ),
)
def test_the_first_logits_are_those_of_the_dense_model(model, made):
    assert keeps_function(made)
    dense = weights(model)
    new = upcycle(dense, made, KEY)
    assert {name: a.shape for name, a in new.arrays.items()} == new.shapes
    assert_close(dense, new)


@pytest.mark.parametrize(
    ("model", "made"),
    [
        (DENSE, recipe("switch")),
        (DENSE, recipe(k=3, shards=2)),
        (DENSE, recipe(redrawn=0.5)),
        (DENSE, recipe("qwen2_moe", k=2)),
        (PAIR, recipe(redrawn=0.5, layers=("encoder 2",))),
    ],
    ids=("gates", "parts", "redrawn", "raw", "encoder"),
)
def test_what_promises_nothing_differs(model, made):
    assert not keeps_function(made)
    dense = weights(model)
    assert np.abs(logits(dense) - logits(upcycle(dense, made, KEY))).max() > 1e-3


def test_a_share_of_the_units_of_each_expert_is_drawn_again():
    up = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    down = -np.arange(2 * 4 * 3, dtype=np.float32).reshape(2, 4, 3)
    new = redrawn({"up": up, "down": down}, 0.6, KEY)  # floor(0.6 * 4) = 2 units
    units = np.asarray(new["up"] != up).all(1)  # (E, F)
    assert units.sum(1).tolist() == [2, 2]
    np.testing.assert_array_equal(units, np.asarray(new["down"] != down).all(2))
    same = np.asarray(new["up"] == up)
    assert same[~units[:, None].repeat(3, 1)].all()


def test_drawn_units_have_the_mean_and_the_deviation_of_the_old_ones():
    up = 5 + 3 * np.random.default_rng(0).standard_normal((1, 400, 50)).astype(np.float32)
    new = redrawn({"up": up, "down": np.ones((1, 50, 400), np.float32)}, 1.0, KEY)["up"]
    assert abs(float(new.mean()) - 5) < 0.1 and abs(float(new.std()) - 3) < 0.1
    assert (np.asarray(new) != up).all()


def test_the_mean_and_the_deviation_are_those_of_the_drawn_units_alone():
    # One unit of constant weights has no deviation, so that the drawn weights are the old ones.
    up = np.broadcast_to(np.arange(4, dtype=np.float32), (1, 3, 4))
    down = np.broadcast_to(np.arange(4, dtype=np.float32)[:, None], (1, 4, 3))
    new = redrawn({"up": up, "down": down}, 0.3, KEY)  # floor(0.3 * 4) = 1 unit
    np.testing.assert_array_equal(new["up"], up)
    np.testing.assert_array_equal(new["down"], down)


def test_nothing_is_drawn_by_default():
    dense = weights(DENSE)
    new = upcycle(dense, recipe(experts=2), KEY)
    for name in ("up", "gate", "down"):
        copies = new.arrays[f"params/layers/0/feed_forward/experts/{name}"]
        one = dense.arrays[f"params/layers/0/feed_forward/{name}"]
        np.testing.assert_array_equal(copies, np.stack([one, one]))


@pytest.mark.parametrize("name", ["moe_plus_plus", "hash", "zaya"])
def test_every_array_of_a_router_is_drawn(name):
    new = upcycle(weights(PAIR), recipe(name), KEY)
    assert {name: a.shape for name, a in new.arrays.items()} == new.shapes


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ((), ["encoder 0", "encoder 1", "encoder 2", "decoder 0", "decoder 1"]),
        ((1,), ["encoder 1", "decoder 1"]),
        ((2, "decoder 0"), ["encoder 2", "decoder 0"]),  # the decoder has no layer 2
        (("encoder 0",), ["encoder 0"]),
    ],
)
def test_an_index_means_a_layer_of_each_stack_and_a_name_one_of_them(layers, names):
    model = upcycled_config(weights(PAIR), recipe("loss_free", k=2, layers=layers))
    assert [layer.name for layer in model.sparse_layers()] == names
    assert model.encoder_moe.group_size == model.decoder_moe.group_size == 8


def test_every_layer_has_routers_and_new_units_of_its_own():
    new = upcycle(weights(PAIR), recipe(experts=2, redrawn=0.5), KEY)
    kernels = [np.asarray(a) for n, a in new.arrays.items() if n.endswith("router/kernel")]
    assert len(kernels) == 5
    assert len({kernel.tobytes() for kernel in kernels}) == 5
    for stack, other in (("encoder", "decoder"), ("decoder", "encoder")):
        up = new.arrays[f"params/{stack}/0/feed_forward/experts/up"]
        one = weights(PAIR).arrays[f"params/{stack}/0/feed_forward/up"]
        kept = np.asarray(up == one).all(1)  # (E, F)
        assert kept.sum(1).tolist() == [6, 6]
        there = weights(PAIR).arrays[f"params/{other}/0/feed_forward/up"]
        assert not np.asarray(up == there).any()


@pytest.mark.parametrize(
    ("model", "made", "match"),
    [
        (config(), recipe(), "has experts already"),
        (DENSE, recipe(shards=5), "shards=5 does not divide model.mlp_dim=12"),
        (DENSE, recipe(shards=3), "shards=3 does not divide experts=8"),
        (DENSE, recipe(redrawn=1.5), "redrawn=1.5 is not a share"),
        (DENSE, recipe(layers=(7,)), "layer 7 does not exist: the layers are 0, 1"),
        (DENSE, recipe(layers=("encoder 1",)), "layer encoder 1 does not exist: the layers are 0"),
        (DENSE, recipe(experts=1), "k=2 experts per token, but there are 1"),
        (two_stacks(), recipe(), "has experts already"),
        (dataclasses.replace(PAIR, decoder_moe=MOE), recipe(), "has experts already"),
        (
            PAIR,
            recipe("expert_choice"),
            "expert choice in a causal decoder routes a token",
        ),
        (PAIR, recipe(layers=("decoder 2",)), "layer decoder 2 does not exist: .* decoder 0, dec"),
        (PAIR, recipe(layers=(1, "encoder 1")), "model.encoder_moe.layers names layer 1 twice"),
    ],
)
def test_bad_recipes_are_one_line(model, made, match):
    with pytest.raises(ConfigError, match=match) as error:
        upcycle(weights(model), made, KEY)
    assert "\n" not in str(error.value)
