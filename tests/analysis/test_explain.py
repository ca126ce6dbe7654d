"""Causal effects against models whose weights are zeroed, sums of contributions, and the page."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import models
from moe_jax.analysis.contributions import Contributions
from moe_jax.analysis.explain import Explanation, _layer, measure, require_explainable
from moe_jax.analysis.explained import lines, write_explanation
from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface import FAMILIES
from moe_jax.nn.mode import DECODE
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.shared import SharedConfig
from moe_jax.routing import preset
from tests import browser
from tests.test_face import TINY_MIXTRAL

IDS = [5, 7, 3]
SHARED = {
    "model_type": "qwen2_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
}
TINY = {**TINY_MIXTRAL, "num_hidden_layers": 2, "num_local_experts": 8}


@pytest.fixture(scope="module")
def model():
    """A Mixtral of two layers, which a scan runs, with eight experts each."""
    return models.make(FAMILIES["mixtral"].read(TINY), TINY["vocab_size"], jax.random.key(0))


@pytest.fixture(scope="module")
def batch():
    tokens = jnp.array([IDS])
    return {"inputs": tokens, "segments": jnp.ones_like(tokens), "positions": jnp.arange(3)[None]}


@pytest.fixture(scope="module")
def found(model, batch):
    return measure(model, batch, batch_size=5)  # 12 removals: two full batches and a part


@jax.jit
def log_p(model, batch):
    hidden, _ = model.hidden(batch["inputs"], batch["segments"], batch["positions"], mode=DECODE)
    return jax.nn.log_softmax(model.logits(hidden)[0])


def test_an_effect_is_that_of_zeroed_output_weights(model, batch, found):
    assert compared(model, batch, found) >= 4


def test_an_effect_beside_shared_experts_is_that_of_zeroed_output_weights(batch):
    config = FAMILIES["qwen2_moe"].read({**TINY_MIXTRAL, **SHARED, "num_hidden_layers": 2})
    model = models.make(config, 96, jax.random.key(0))
    assert compared(model, batch, measure(model, batch, batch_size=5)) >= 1


def compared(model, batch, found):
    """Counts experts, whose effects have to be the changes that zeroed output weights make."""
    # An expert that one token alone has chosen can be removed for all tokens instead.
    base, rows, count = np.asarray(log_p(model, batch)), np.arange(3), 0
    np.testing.assert_allclose(found.log_likelihoods, base[rows, found.next_ids], atol=1e-5)
    assert list(found.next_ids) == [7, 3, base[2].argmax()]
    for view, layer in zip(model.layers.layers(), found.layers, strict=True):
        for token, choice in np.ndindex(layer.experts.shape):
            expert = layer.experts[token, choice]
            if (layer.experts == expert).sum() == 1:
                count += 1
                down = view.block.feed_forward.experts.down
                before = down[...]
                at = expert if view.entry is None else (view.entry, expert)
                down[...] = before.at[at].set(0)
                after = np.asarray(log_p(model, batch))
                down[...] = before
                target = token, found.next_ids[token]
                change = after[target] - base[target]
                assert layer.effects[token, choice] == pytest.approx(change, abs=1e-5)
                assert abs(change) > 1e-4
    return count


def test_contributions_sum_to_the_output_and_gates_to_one(found):
    for layer in found.layers:
        assert layer.error < 1e-6
        np.testing.assert_allclose(layer.gates.sum(1), 1, atol=1e-6)  # Mixtral's two gates do.
        assert not layer.others.any()
        # The norm of a sum is at most the sum of the norms, and no part is empty.
        assert (layer.norms > 0).all() and (layer.output <= layer.norms.sum(1) + 1e-6).all()


def test_an_effect_where_experts_choose_is_that_of_zeroed_output_weights(batch):
    # One expert of factor 1 and three tokens: two tokens of eight experts have none.
    router = preset("expert_choice", capacity_factor=2.0)
    moe = MoEConfig(
        every=1, num_experts=4, expert_dim=8, router=router, allow_future_leak=True, group_size=2
    )
    config = models.DecoderConfig(num_layers=2, width=16, num_heads=2, mlp_dim=16, moe=moe)
    model = models.make(config, 96, jax.random.key(0))
    found, base = measure(model, batch, batch_size=5), np.asarray(log_p(model, batch))
    assert sum(layer.error < 1e-6 for layer in found.layers) == 2
    for view, layer in zip(model.layers.layers(), found.layers, strict=True):
        assert (layer.experts >= 0).sum(0).tolist() == [1] * 4
        for token, choice in np.argwhere(layer.experts >= 0):
            down = view.block.feed_forward.experts.down
            before = down[...]
            at = (layer.experts[token, choice],) if view.entry is None else (view.entry, choice)
            down[...] = before.at[at].set(0)
            after = np.asarray(log_p(model, batch))
            down[...] = before
            target = token, found.next_ids[token]
            assert layer.effects[token, choice] == pytest.approx(
                after[target] - base[target], abs=1e-5
            )


def test_the_shared_network_is_a_part_of_its_own(batch):
    config = FAMILIES["qwen2_moe"].read({**TINY_MIXTRAL, **SHARED, "num_hidden_layers": 1})
    (layer,) = measure(models.make(config, 96, jax.random.key(0)), batch).layers
    assert (layer.others > 0).all() and layer.error < 1e-6


@pytest.mark.parametrize(
    "shared",
    [
        SharedConfig(8, norms=True),  # Gemma 4
        SharedConfig(8, mix="softmax"),
        SharedConfig(8, mix="conditional"),
    ],
    ids=str,
)
def test_the_shared_part_is_the_output_without_experts(shared, batch):
    moe = MoEConfig(
        every=1, num_experts=4, expert_dim=8, router=preset("mixtral"), group_size=4, shared=shared
    )
    config = models.DecoderConfig(num_layers=1, width=16, num_heads=2, mlp_dim=16, moe=moe)
    model = models.make(config, 96, jax.random.key(0))
    (layer,) = measure(model, batch).layers
    assert layer.error < 1e-5 and (layer.others > 0).all()
    (view,) = model.layers.layers()
    down = view.block.feed_forward.experts.down
    down[...] = 0 * down[...]
    (bare,) = measure(model, batch).layers
    np.testing.assert_allclose(layer.others, bare.output, rtol=1e-5)


def test_numbers_that_are_not_finite_are_absent_from_the_page(found, tmp_path):
    broken = dataclasses.replace(explanation(found), log_likelihoods=np.array([np.nan, 0, 1]))
    page, numbers = write_explanation(broken, tmp_path / "a.html", "title")
    assert json.loads(numbers.read_text())["log_likelihoods"] == [None, 0, 1]
    assert "NaN" not in page.read_text()


def test_a_rounding_error_is_no_part_of_the_output():
    # The first token has a difference of float32 beside its output of 2, the second a real part.
    choices, rows = np.ones((1, 2, 1)), np.array([[2.0, 2.0]])
    others = np.array([[2e-7, 0.5]])
    parts = Contributions(choices.astype(int), choices, choices, others, rows, 0 * rows)
    assert _layer(0, False, 4, parts, np.zeros((2, 1))).others.tolist() == [0, 0.5]


def explanation(found):
    pieces = ("a", " <b>", "\n")
    layers = found.layers
    return Explanation(pieces, (), ("x", "y", "z"), found.log_likelihoods, layers)


def test_lines_have_every_choice(found):
    shown = lines(explanation(found))
    assert sum("effect" in line for line in shown) == 2 * 3 * 2
    assert shown[-1].startswith("sums: ")
    first = found.layers[0]
    wanted = f"layer 0  expert {first.experts[0, 0]}  gate {first.gates[0, 0]:.3f}"
    assert wanted in shown[1]


def test_the_numbers_are_beside_the_page(found, tmp_path):
    page, numbers = write_explanation(explanation(found), tmp_path / "a.html", "title")
    content = json.loads(numbers.read_text())
    np.testing.assert_allclose(content["layers"][1]["effects"], found.layers[1].effects)
    assert content["pieces"][1] == " <b>"
    assert "<b>" not in page.read_text() and "http://" not in page.read_text().replace(
        "http://www.w3.org/2000/svg", ""
    )


def test_a_click_shows_the_experts_of_a_token(found, tmp_path):
    page, _ = write_explanation(explanation(found), tmp_path / "a.html", "title")
    wanted = found.layers[0].experts[1]
    with browser.started() as chromium, browser.opened(chromium, page.as_uri(), 400, "dark") as one:
        browser.check_layout(one)
        cells = one.locator(".cell")
        assert cells.count() == 2 * 3
        assert one.inner_text("#where").startswith("layer 1, token 2: ")
        cells.nth(1).click()
        assert one.inner_text("#where").startswith("layer 0, token 1: ␣<b>, next y (log p ")
        shown = one.locator("#choices tr > td:first-child").all_inner_texts()
        assert shown == [*map(str, wanted), "output"]
        one.fill("#only", str(wanted[1]))
        shown = one.locator("#choices tr > td:first-child").all_inner_texts()
        assert shown == [str(wanted[1]), "output"]
        one.select_option("#measure", "gates")
        gates = [x[layer.experts == wanted[1]] for layer in found.layers for x in [layer.gates]]
        assert one.inner_text("#scale").endswith(f"{np.concatenate(gates).max():#.3g}.")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (models.DecoderConfig(moe=MoEConfig(every=0)), "dense"),
        (models.DecoderConfig(causal=False), "predicts masked tokens"),
        (
            models.DecoderConfig(moe=MoEConfig(router=preset("soft_moe"), allow_future_leak=True)),
            "take mixtures of all tokens",
        ),
    ],
)
def test_a_model_that_cannot_be_explained_is_named(config, reason):
    with pytest.raises(ConfigError, match=reason) as error:
        require_explainable(config)
    assert "\n" not in str(error.value)
    require_explainable(dataclasses.replace(models.DecoderConfig()))
