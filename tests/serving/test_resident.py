"""The model of an engine computes choices, and on a CPU it reads every weight where it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import routing
from moe_jax.models import Decoder, DecoderConfig
from moe_jax.nn.mode import DECODE
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.parallel import MeshConfig, make_mesh
from moe_jax.serving.resident import SeparateExperts, by_choice, resident

MOE = MoEConfig(every=2, num_experts=3, expert_dim=8, group_size=16, transport="gather")
SMALL = DecoderConfig(num_layers=4, width=4, num_heads=2, head_dim=2, mlp_dim=8, moe=MOE)
VOCAB = 11


def outputs(model):
    tokens = jnp.arange(10).reshape(2, 5) % VOCAB
    ones, places = jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(5), tokens.shape)
    hidden, _ = model.hidden(tokens, ones, places, mode=DECODE)
    return model.logits(hidden)


@pytest.mark.parametrize("preset", ["switch", "mixtral"])
def test_a_resident_model_has_the_outputs_of_its_model(preset):
    moe = dataclasses.replace(MOE, router=routing.preset(preset))
    model = Decoder(dataclasses.replace(SMALL, moe=moe), VOCAB, jax.random.key(0))
    found = resident(model, smallest=1)
    assert model.layers.repeats == (2,) and found.layers.repeats == (1,) * 4
    sparse = [layer.block for layer in found.layers.layers() if layer.block.mixtures]
    assert [type(each.feed_forward.experts) for each in sparse] == [SeparateExperts] * 2
    run = jax.jit(outputs)
    np.testing.assert_allclose(run(found), run(model), rtol=1e-5, atol=1e-5)


def test_no_program_copies_a_matrix_of_an_expert():
    # A slice of the stacked arrays would be an instruction with the shape of one matrix.
    model = resident(Decoder(SMALL, VOCAB, jax.random.key(0)), smallest=1)
    text = jax.jit(outputs).lower(model).compile().as_text()
    matrix = f"f32[{MOE.expert_dim},{SMALL.width}]"
    made = [line for line in text.splitlines() if f" = {matrix}" in line]
    assert made
    assert [line for line in made if "slice(" in line or "copy(" in line] == []


def test_small_matrices_stay_stacked_and_choices_are_computed():
    found = resident(Decoder(SMALL, VOCAB, jax.random.key(0)))
    assert found.layers.repeats == (2,)
    layer = found.layers.parts[0][1].feed_forward
    assert layer.config.transport == "ragged"


def test_the_transport_follows_the_mesh_and_the_layer():
    assert by_choice(MOE).transport == "ragged"
    with jax.set_mesh(make_mesh(MeshConfig(data=4, expert=2))):
        found = by_choice(MOE)
        assert (found.transport, found.exchange) == ("ragged", "ragged")
        rings = dataclasses.replace(MOE, exchange="ring")
        assert by_choice(rings) is rings  # The user chose what is sent.
    assert by_choice(rings).transport == "ragged"  # Without a mesh nothing is sent.
    widths = dataclasses.replace(MOE, expert_dims=(4, 8, 12))
    assert by_choice(widths) is widths  # Experts of several widths need slots.
