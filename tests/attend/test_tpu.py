"""A long attention compiled for a TPU holds no scores of the whole length."""

import importlib.util
import os
import subprocess
import sys

import pytest

PROGRAM = """
import jax, jax.numpy as jnp
from moe_jax.attend import Options, View, attend
from moe_jax.parallel import MeshConfig, make_mesh
from moe_jax.planning import topology
place = topology.parse("v5p:2x2x1")
topology.prepare(place)
mesh = make_mesh(MeshConfig(1), list(place.devices())[:1])
def loss(q, k, v, segments, positions):
    y = attend(q, k, v, View(segments, positions), Options())
    return y.astype(jnp.float32).sum()
with jax.set_mesh(mesh):
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    tensor = jax.ShapeDtypeStruct((1, 32, 8192, 128), jnp.bfloat16, sharding=whole)
    ids = jax.ShapeDtypeStruct((1, 8192), jnp.int32, sharding=whole)
    step = jax.jit(jax.grad(loss, (0, 1, 2))).lower(tensor, tensor, tensor, ids, ids).compile()
print("splash" in step.as_text(), step.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="the extra tpu is not installed")
def test_a_long_attention_on_a_tpu_is_the_kernel_with_few_temporaries():
    # The scores of 32 heads and 8,192 tokens are 8.6 GB in float32.
    environment = os.environ | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kernel, held = done.stdout.split()[-2:]
    assert kernel == "True"
    assert int(held) < 1e9
