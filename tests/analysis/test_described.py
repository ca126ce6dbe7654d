"""What was run, in words."""

import dataclasses

import pytest

from moe_jax.analysis.described import part, what_was_run
from moe_jax.config.loading import experiment_of
from moe_jax.config.optimizer import AdamW
from moe_jax.config.schema import describe


def described(config, overrides=None, **more):
    return what_was_run({"config": describe(experiment_of(config, overrides)), **more})


def test_the_quickstart():
    rows = described("quickstart", corpus={"training": 1234}, command="moe-jax train quickstart")
    assert [*rows] == [*("model", "router", "capacity", "data", "optimizer", "training", "command")]
    assert rows["model"] == (
        "decoder, 4 layers of width 128, 4 heads, experts in layers 1, 3: 8 experts of width 512"
    )
    assert rows["router"] == ("score Softmax; select TopK (k 1); balance LoadBalance (weight 0.01)")
    assert rows["capacity"] == "factor 1.25 in training, 2 in evaluation"
    assert rows["data"] == (
        "python_library, 1,234 documents; tokenizer sentencepiece; 8 rows of 256 tokens per step"
    )
    assert rows["optimizer"] == (
        "AdamW, learning rate 0.003, Cosine (final 0.02) after 50 steps of warmup"
    )
    assert rows["training"] == "600 steps, 1,228,800 tokens, seed 0"
    assert rows["command"] == "moe-jax train quickstart"


def test_a_latent_space_is_named_with_the_experts():
    model = described("quickstart", {"model.moe.latent_dim": 32})["model"]
    assert model.endswith("8 experts of width 512 in a latent space of width 32")


def test_a_dense_model_has_no_router():
    rows = described("quickstart:dense")
    assert "router" not in rows and "capacity" not in rows
    assert rows["model"].endswith("dense layers of width 512")


def test_an_encoder_decoder_has_two_stacks():
    assert described("span_corruption")["model"].startswith("encoder-decoder, ")


@pytest.mark.parametrize(
    ("dropless", "text"),
    [
        ("always", "none: no token is dropped"),
        ("eval", "factor 1.25 in training, none in evaluation"),
    ],
)
def test_a_dropless_router_has_no_capacity(dropless, text):
    parts = {"score": {"type": "Softmax"}, "select": {"type": "TopK"}}
    router = {**parts, "capacity": {"dropless": dropless}}
    config = experiment_of("quickstart", {"model.moe.transport": "ragged"})
    saved = describe(config)
    saved["model"]["moe"]["router"] = router
    assert what_was_run({"config": saved})["capacity"] == text


def test_routers_of_several_kinds_are_all_named():
    other = ({"layers": (1,), "router": {"preset": "gshard"}, "num_experts": 4},)
    rows = described("quickstart", {"model.moe.overrides": other})
    assert "4 experts of width 512 or 8 experts of width 512" in rows["model"]
    assert " or " in rows["router"]


def test_a_part_shows_what_is_no_default():
    assert part(AdamW()) == "AdamW"
    assert part(dataclasses.replace(AdamW(), b2=0.5, eps=1e-6)) == "AdamW (b2 0.5, eps 1e-06)"


def test_what_is_unknown_is_left_out():
    assert what_was_run({}) == {}
    assert what_was_run({"config": {"nothing": 1}, "command": "x"}) == {"command": "x"}
