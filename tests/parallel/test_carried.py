"""Values that pass from router to router are equal on one device and on eight."""

import jax
import jax.numpy as jnp
import pytest

from moe_jax import routing
from moe_jax.models import Decoder, DecoderConfig
from moe_jax.nn.mode import TRAIN
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.routing import Router, Softmax, TopK
from tests.matrix import covering
from tests.parallel.test_parity import SEGMENTS, TOKENS, on_mesh, same

ROUTERS = {
    "moe_plus_plus": routing.preset("moe_plus_plus"),
    "zaya": routing.preset("zaya", dim=6),
    # Without free experts, and two experts for a token.
    "top2": Router(Softmax(), TopK(2), head=routing.ResidualLinear()),
}


def model(name: str) -> Decoder:
    # 3 MoE layers in a scan; groups of 12 among 8 x 16 tokens, so the last one has padding.
    config = DecoderConfig(
        num_layers=3,
        width=8,
        num_heads=2,
        head_dim=4,
        mlp_dim=8,
        moe=MoEConfig(every=1, num_experts=8, expert_dim=8, group_size=12, router=ROUTERS[name]),
    )
    return Decoder(config, 40, jax.random.key(0))


def step(decoder, tokens, segments):
    def objective(decoder, tokens):
        places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        y, reports = decoder.hidden(tokens, segments, places, mode=TRAIN)
        counts = [report.counts for report in reports]
        return jnp.sin(y).sum() + sum(report.loss for report in reports), (y, counts)

    return jax.value_and_grad(objective, has_aux=True, allow_int=True)(decoder, tokens)


# data, expert, model and fsdp.
MESHES = [(2, 4, 1), (2, 2, 2), (1, 2, 2, 2)]


@pytest.mark.parametrize(("name", "sizes"), covering(list(ROUTERS), MESHES, 9))
def test_a_decoder_is_the_same_on_every_mesh(name: str, sizes):
    decoder = model(name)
    same(on_mesh(step, sizes, decoder, TOKENS, SEGMENTS), jax.jit(step)(decoder, TOKENS, SEGMENTS))
