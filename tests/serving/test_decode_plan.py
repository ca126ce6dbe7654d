"""Plans of a decode step, against the program and the arrays of an engine."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest
from moe_jax.configs import quickstart

from moe_jax.config.experiment import Experiment
from moe_jax.config.schema import build
from moe_jax.errors import ConfigError
from moe_jax.models import Decoder
from moe_jax.parallel import MeshConfig, make_mesh, shardings_of_state
from moe_jax.planning import page, topology
from moe_jax.planning.compile import Compiled, needed_memory
from moe_jax.serving.decode_plan import DecodeBounds, plan_decoding, without_inputs
from moe_jax.serving.decode_work import Decoding
from moe_jax.serving.program import StepShape, lowered, pages_of

ASKED = Decoding(batch=4, context=8, page=4)
EIGHT = topology.parse("cpu:8")


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    config = quickstart.get_config()
    config.data.update(vocab_size=256, tokenizer="bytes")
    config.model.update(width=16, num_heads=2, head_dim=8, mlp_dim=16, num_layers=2)
    config.model.moe.update(expert_dim=16, group_size=1)
    return dataclasses.replace(build(Experiment, config), mesh=MeshConfig(1, 2, 2, 2))


def test_bytes_are_those_of_the_program_of_an_engine(experiment):
    found = plan_decoding(experiment, EIGHT, ASKED)
    mesh = make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        model = Decoder(experiment.model, experiment.vocab_size, jax.random.key(0))
        model = jax.device_put(model, shardings_of_state(model, mesh))
        pages = pages_of(model, ASKED.entries)
        program = lowered(model, pages, StepShape(4, 0, 2, 4), 20).compile()
    held = found["bytes_per_device"]
    # Two layers keep a key and a value of one of two heads of 8, for each of 9 pages of 4.
    assert held["cache"] == 2 * 2 * 8 * 9 * 4 * 4
    first = jax.devices()[0]
    shards = [x.addressable_shards for x in jax.tree.leaves(model)]
    here = sum(one.data.nbytes for parts in shards for one in parts if one.device == first)
    assert held["parameters"] == here
    assert held["temporaries"] == program.memory_analysis().temp_size_in_bytes
    assert found["compiled"]["ok"]
    assert found["roofline"] is None
    assert json.loads(json.dumps(found)) == found
    assert "4 of 8 tokens" in page.decoding(found)


def test_inputs_of_a_program_that_does_not_fit_are_no_temporaries():
    # Of 24 bytes that the compiler reports, 16 are parameters and pages.
    found = without_inputs(Compiled(temporaries=24, limit=20, error="too much"), 16)
    needed = needed_memory(found, 16, 32)
    assert (needed["temporaries"], needed["peak"], needed["missing"]) == (8, 24, 4)


def test_reading_and_products_overlap_and_collectives_do_not():
    bounds = DecodeBounds(compute=3.0, parameters=2.0, cache=1.5, links=0.5)
    assert bounds.step == 4.0
    assert bounds.bound == "compute"
    assert bounds.record(8)["tokens_per_second"] == 2.0


@pytest.mark.parametrize(
    ("machine", "changes", "said"),
    [
        ("h100:8", {}, "h100:8 has GPUs"),
        ("cpu:8", {"mesh": MeshConfig(data=1, expert=3)}, "not divisible by mesh.expert=3"),
    ],
)
def test_what_cannot_be_planned_is_one_line(experiment, machine, changes, said):
    changed = dataclasses.replace(experiment, **changes)
    with pytest.raises(ConfigError, match=said):
        plan_decoding(changed, topology.parse(machine), ASKED)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu compiles for TPUs; make planner"
)
def test_a_step_with_one_expert_per_device_is_compiled_for_a_tpu():
    settings = {"width": 256, "head_dim": 128, "num_heads": 2, "num_kv_heads": 2, "num_layers": 2}
    command = [
        *(sys.executable, "-m", "moe_jax.plan", "--config=configs/published/mixtral_8x7b.py"),
        *("--topology=v5e:2x4", "--mesh=expert=8", "--decode", "--batch=64", "--context=256"),
        *(f"--config.model.{name}={value}" for name, value in settings.items()),
        *("--config.model.moe.expert_dim=512", "--config.model.moe.group_size=8"),
    ]
    environment = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["fits"]
    # bfloat16 keys and values of 2 layers and 2 heads of 128, whole on every device.
    assert found["bytes_per_device"]["cache"] == 2 * 2 * 2 * 128 * 2 * (1 + 64 * 16) * 16
    # The program writes the entries in place.
    assert found["bytes_per_device"]["temporaries"] < found["bytes_per_device"]["cache"] / 4
    kinds = {one["kind"] for one in found["collectives"] if one["axes"] == ["expert"]}
    assert "ragged-all-to-all" in kinds
