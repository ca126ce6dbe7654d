"""The demonstration of offloading, at a small shape with real files."""

from moe_jax.offload import FileStore, write_experts
from tools import offload_demo

SMALL = {
    "model.width": 32,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.head_dim": 16,
    "model.mlp_dim": 32,
    "model.moe.expert_dim": 32,
    "data.vocab_size": 64,
}


def test_a_model_larger_than_its_budget_generates(tmp_path):
    model = offload_demo.without_weights(2, SMALL)
    write_experts(offload_demo.random_experts(model, 0), tmp_path)
    # Three matrices of 32 x 32 codes in half a byte, with 32 scales of four bytes each.
    one = 3 * (32 * 32 // 2 + 4 * 32)
    assert FileStore(tmp_path).nbytes((1, 7)) == one
    found = offload_demo.measured(model, tmp_path, budget=3 * one, tokens=3)
    assert len(found["tokens"]) == 3 and found["experts"] == 16
    assert found["bytes_moved"] >= one and found["bytes_on_disk"] > 16 * one


def test_the_shape_is_that_of_mixtral_8x7b():
    model = offload_demo.without_weights(1)
    experts = next(offload_demo.experts_of(model))
    assert experts.up.shape == (8, 4096, 14336)
    assert experts.down.shape == (8, 14336, 4096)
