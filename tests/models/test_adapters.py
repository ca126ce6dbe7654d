"""Adapters of whole models: where they stand, what they change, and their merge."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from moe_jax import models, routing
from moe_jax.config.loading import experiment_of
from moe_jax.errors import ConfigError
from moe_jax.models import DecoderConfig, EncoderDecoderConfig
from moe_jax.models.adapters import is_adapter, merged, name_without_adapter
from moe_jax.models.groups import check_adapters
from moe_jax.models.places import places
from moe_jax.nn.adapted import LoRA
from moe_jax.nn.attention_experts import AttentionExpertsConfig
from moe_jax.nn.latent import Latent
from moe_jax.nn.mode import DECODE
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.shared import SharedConfig

MOE = MoEConfig(
    every=1, num_experts=4, expert_dim=6, group_size=8, router=routing.preset("mixtral")
)
SIZES = {"width": 8, "num_heads": 2, "head_dim": 4, "mlp_dim": 12}
PLAIN = DecoderConfig(num_layers=2, gated=True, moe=MOE, **SIZES)
ALL = ("experts", "attention", "router")
LATENT = Latent(query_rank=5, kv_rank=6, plain_dim=4, rotary_dim=2, value_dim=3)


def adapted(model, *groups, **changes):
    return dataclasses.replace(model, lora=LoRA(2, 4.0, groups or ALL), **changes)


def moe(**changes):
    return dataclasses.replace(MOE, **changes)


MODELS = {
    "scanned": adapted(PLAIN),
    "unrolled": adapted(PLAIN, scan_layers=False),
    "latent attention and shared experts": adapted(
        PLAIN,
        *(*ALL, "shared"),
        attention=LATENT,
        moe=moe(shared=SharedConfig(6, "sigmoid"), transport="gather"),
    ),
    "a latent width, several widths, a dense layer": adapted(
        PLAIN, *(*ALL, "latent", "dense"), moe=moe(layers=(1,), every=0, latent_dim=4)
    ),
    "several widths": adapted(PLAIN, "layers", moe=moe(expert_dims=(4, 8))),
    "experts in attention": adapted(
        PLAIN, attention_experts=AttentionExpertsConfig(every=2, num_experts=4, group_size=8)
    ),
    "lookahead": adapted(PLAIN, "experts", "lookahead", lookahead=1),
    "an encoder-decoder": adapted(
        EncoderDecoderConfig(
            encoder_layers=2, decoder_layers=1, encoder_moe=MOE, decoder_moe=MOE, **SIZES
        )
    ),
}


def filled(model, seed=0):
    """A model, and the same with drawn adapters."""
    first = models.make(model, 13, jax.random.key(seed))
    graph, state = nnx.split(first)
    flat, rng = dict(nnx.to_flat_state(state)), np.random.default_rng(seed)
    for path, variable in flat.items():
        if str(path[-1]) == "lora_b":
            drawn = rng.normal(size=variable.get_value().shape).astype(np.float32)
            flat[path] = variable.replace(jax.numpy.asarray(drawn))
    return first, nnx.merge(graph, nnx.from_flat_state(flat))


def outputs(model):
    """The hidden states of a batch, with a slot for every choice."""
    ids = np.random.default_rng(0).integers(0, 13, (2, 8)).astype(np.int32)
    ones = np.ones((2, 8), np.int32)
    batch = {"inputs": ids, "targets": ids, "segments": ones, "positions": np.arange(8) * ones}
    batch |= {"encoder_inputs": ids, "encoder_segments": ones}
    graph, state = nnx.split(model)
    read = jax.jit(lambda state: nnx.merge(graph, state).read(batch, mode=DECODE).hidden)
    return np.asarray(read(state))


@pytest.mark.parametrize("name", MODELS)
def test_the_first_outputs_are_the_base_s_and_merged_ones_the_adapted_ones(name):
    config = MODELS[name]
    first, drawn = filled(config)
    base = models.make(dataclasses.replace(config, lora=None), 13, jax.random.key(0))
    before, after = outputs(base), outputs(drawn)
    np.testing.assert_array_equal(outputs(first), before)
    assert np.abs(after - before).max() > 0.01
    plain = merged(drawn)
    assert plain.config == base.config
    assert jax.tree.structure(nnx.state(plain)) == jax.tree.structure(nnx.state(base))
    np.testing.assert_array_equal(outputs(plain), after)


def test_groups_select_matrices_by_part_and_layer():
    unrolled = dataclasses.replace(PLAIN, scan_layers=False)
    found = {n for n in places(adapted(unrolled, "layers/1/router", "head")) if is_adapter(n)}
    kernel = "params/layers/1/feed_forward/router/kernel"
    assert found == {f"{kernel}/lora_a", f"{kernel}/lora_b"}
    for config in MODELS.values():
        names = {name_without_adapter(n) for n in places(config) if not is_adapter(n)}
        assert names == {*places(dataclasses.replace(config, lora=None))}


def test_scanning_changes_no_adapter():
    scanned, unrolled = (
        models.make(MODELS[name], 13, jax.random.key(0)) for name in ("scanned", "unrolled")
    )
    one, two = (
        {n: x for n, x in _by_layer(model).items() if is_adapter(n)}
        for model in (scanned, unrolled)
    )
    assert len(one) == 2 * 2 * (3 + 4 + 1)  # two arrays, two layers, eight matrices
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, two[name])


def _by_layer(model):
    state = dict(nnx.to_flat_state(nnx.state(model)))
    found = {}
    for path, place in models.stored(model).items():
        value = state[place.path].get_value()
        name = "params/" + "/".join(map(str, path))
        found[name] = np.asarray(value if place.entry is None else value[place.entry])
    return found


# ---------------------------------------------------------------- settings

START = {"model.lora.rank": 4}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.lora.rank": 0, "model.lora.groups": ("experts",)}, "model.lora.rank"),
        ({"model.lora.rank": 4}, "model.lora.groups is empty: name groups"),
        ({"model.lora.groups": ("expert",)}, "model.lora.groups has no group 'expert'; did you"),
        ({"model.lora.groups": ("router", "norms")}, "model.lora.groups has 'norms', in which no"),
        ({"model.lora.groups": ("embedding",)}, "model.lora.groups has 'embedding', in which no"),
        (
            {"model.lora.groups": ("layers/1",), "model.moe.every": 1, "model.scan_layers": True},
            "scan_layers=False",
        ),
        (
            {"model.lora.groups": ("experts",), "optimizer.frozen": ("layers",)},
            "optimizer.frozen names all parameters",
        ),
    ],
)
def test_adapters_that_cannot_be_are_one_line(settings, message):
    with pytest.raises(ConfigError) as error:
        experiment_of("quickstart", settings)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_adapters_need_a_trained_model():
    found = experiment_of("quickstart", {"model.lora.groups": ("experts",)})
    with pytest.raises(ConfigError, match=r"model.lora adapts a trained model: set training.start"):
        found.check(8)
    check_adapters(PLAIN)


def test_only_adapters_are_trained():
    found = experiment_of("quickstart", {"model.lora.groups": ("experts",)})
    leaves = {place.leaf for place in places(found.model).values()}
    assert leaves - found.frozen_leaves == {leaf for leaf in leaves if is_adapter(leaf)}
    less = {"model.lora.groups": ("experts",), "optimizer.frozen": ("layers/1",)}
    trained = leaves - experiment_of("quickstart", less).frozen_leaves
    assert trained and all(leaf.startswith("params/layers/parts/3") for leaf in trained)
