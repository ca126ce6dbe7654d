"""The compiled step of an engine."""

import jax
import pytest

from moe_jax.models import Decoder, DecoderConfig
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.serving.program import StepShape, lowered, pages_of


@pytest.mark.parametrize("scan", [True, False])
def test_a_step_writes_its_entries_in_place(scan):
    config = DecoderConfig(
        num_layers=2,
        width=8,
        num_heads=2,
        head_dim=4,
        mlp_dim=8,
        moe=MoEConfig(every=0),
        scan_layers=scan,
    )
    model = Decoder(config, 11, jax.random.key(0))
    layers = pages_of(model, 4096 * 4)
    step = lowered(model, layers, StepShape(slots=2, chunk=0, pages=2, page=4), top=1).compile()
    memory = step.memory_analysis()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(layers))
    # The pages of a step take 2 * 2 * 4 entries; a copy of one of the 4 arrays would be size / 4.
    assert size == 2 * 2 * 2 * 4096 * 4 * 4 * 4
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 50
