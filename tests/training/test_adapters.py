"""Steps that train adapters alone, on one device and on eight."""

import dataclasses
import functools
import math

import jax
import numpy as np

from moe_jax.config.experiment import Experiment
from moe_jax.config.optimizer import SGD, OptimizerConfig
from moe_jax.models.adapters import is_adapter
from moe_jax.nn.adapted import LoRA
from moe_jax.parallel import MeshConfig, make_mesh
from moe_jax.training.checkpoint import Checkpoints
from moe_jax.training.optimizer import optimizer_of
from moe_jax.training.state import Recipe, named_leaves
from moe_jax.training.step import Objective, train_step
from tests.training.test_frozen import MODEL, batch, values

LORA = LoRA(2, 4.0, ("experts", "attention", "router"))
ADAPTED = dataclasses.replace(MODEL, lora=LORA)
OPTIMIZER = OptimizerConfig(SGD(0.0), warmup_steps=0, learning_rate=1.0)
RUN = Experiment("tiny", ADAPTED, optimizer=OPTIMIZER)


@functools.cache
def stepped(sizes, steps=2):
    """The states of two steps on a mesh, the recipe, and the compiled step."""
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])
    made = Recipe(ADAPTED, 16, optimizer_of(RUN), 0, mesh)
    graph, state = made.create()
    step = functools.partial(train_step, graph, made.optimizer, Objective.of(RUN))
    step = jax.jit(step, compiler_options={"xla_backend_optimization_level": 0})
    states = [state]
    with jax.set_mesh(mesh):
        for number in range(steps):
            states.append(step(states[-1], batch(number))[0])
    return states, made, step


def test_only_adapters_change_and_all_of_them():
    states, _, _ = stepped((2, 4))
    first, last = values(states[0]), values(states[-1])
    weights = [name for name in first if name.startswith(("params/", "router_state/"))]
    moved = {name for name in weights if first[name].tobytes() != last[name].tobytes()}
    assert moved == {name for name in weights if is_adapter(name)} and len(moved) == 14


def test_experts_and_their_adapters_are_on_the_same_devices():
    states, _, _ = stepped((2, 4))
    leaves = named_leaves(states[-1])
    up = "params/layers/parts/0/0/feed_forward/experts/up"
    for name in ("base", "lora_a", "lora_b"):
        shards = leaves[f"{up}/{name}"].addressable_shards
        assert {shard.data.shape[0] for shard in shards} == {2}  # 8 experts on 4 devices
    assert leaves[f"{up}/lora_a"].shape == (8, 8, 2) and leaves[f"{up}/lora_b"].shape == (8, 2, 8)


def test_eight_devices_learn_what_one_learns():
    one, eight = (values(stepped(sizes)[0][-1]) for sizes in ((1,), (2, 4)))
    for name in filter(is_adapter, one):
        if name.startswith("params/"):
            np.testing.assert_allclose(eight[name], one[name], rtol=1e-4, atol=1e-6)


def test_a_resumed_run_goes_on_exactly(tmp_path):
    (_, middle, last), made, step = stepped((2, 4))
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(1, middle, {})
        found = checkpoints.restore(made.abstract()[1])
    with jax.set_mesh(made.mesh):
        again, _ = step(found[1], batch(1))
    assert {n: v.tobytes() for n, v in values(again).items()} == {
        n: v.tobytes() for n, v in values(last).items()
    }


def test_the_optimizer_has_no_state_for_the_base():
    made = Recipe(
        ADAPTED,
        16,
        optimizer_of(dataclasses.replace(RUN, optimizer=OptimizerConfig())),
        0,
        make_mesh(MeshConfig(1), jax.devices()[:1]),
    )
    leaves = named_leaves(made.abstract()[1])
    trained = sum(x.size for n, x in leaves.items() if n.startswith("params/") and is_adapter(n))
    moments = sum(x.size for n, x in leaves.items() if "/mu/" in n or "/nu/" in n)
    assert moments == 2 * trained
