import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.analysis.routing import draw_plan, draw_plans, draw_text
from moe_jax.routing import preset

LOGITS = jnp.tile(jnp.array([3.0, 1.0, 0.0, 0.0]), (8, 1))


def crowded():
    """Eight tokens that all want expert 0, which has three slots."""
    return preset("switch")(LOGITS, capacity=3)


def test_a_plan_shows_its_combine_weights_slot_by_slot():
    plan = crowded()
    left, right = draw_plan(plan, "switch").axes
    shown = left.images[0].get_array()
    np.testing.assert_array_equal(shown, np.asarray(plan.combine).reshape(8, 12))
    assert [bar.get_width() for bar in right.patches] == [3, 0, 0, 0, 5, 0, 0, 0]


def test_a_plan_says_what_was_lost():
    title = draw_plan(crowded(), "switch").get_suptitle()
    assert title == "switch: 5 of 8 assignments dropped, 5 of 8 tokens without an expert"


@pytest.mark.parametrize("name", ["expert_choice", "soft_moe", "hash", "loss_free"])
def test_every_kind_of_plan_is_drawn(name):
    router = preset(name)
    state = {key: jnp.zeros(shape) for key, shape in router.state_shapes(8).items()}
    logits = jnp.zeros((16, 8))
    plan = router(logits, capacity=2, token_ids=jnp.arange(16), state=state)
    assert len(draw_plan(plan).axes) == 2


def test_plans_stand_under_their_names():
    figure = draw_plans({"one": crowded(), "two": crowded(), "three": crowded()}, columns=2)
    assert [axes.get_title() for axes in figure.axes] == ["one", "two", "three", ""]
    assert figure.axes[0].images[0].get_array().shape == (8, 4)


def test_a_text_shows_tokens_and_first_experts():
    taken = np.array([[0, 1, 1], [1, 0, 0], [0, 0, 0]])
    axes = draw_text(["a", " ", "c"], taken, columns=2).axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), [[1, 0], [-1, -1]])
    assert [text.get_text() for text in axes.texts] == ["a", "␣", "c"]


def test_a_text_of_another_length_is_refused():
    with pytest.raises(ValueError, match="2 pieces and experts of 3 tokens"):
        draw_text(["a", "b"], np.ones((3, 2)))
