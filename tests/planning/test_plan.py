"""A plan is honest: it says what a run on the same devices uses."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from moe_jax.errors import ConfigError
from moe_jax.parallel import MeshConfig
from moe_jax.parallel.mesh import AXES
from moe_jax.planning import page, topology
from moe_jax.planning.collectives import collectives, summary
from moe_jax.planning.plan import (
    _products_per_score,
    fitted,
    parse_mesh,
    plan,
    sweep,
    variants,
)
from moe_jax.run.session import Session, open_session

EIGHT = topology.parse("cpu:8")


@pytest.fixture(scope="module")
def planned(tiny):
    return plan(tiny, EIGHT)


@pytest.fixture(scope="module")
def session(tiny) -> Session:
    class Tokenizer:
        vocab_size = tiny.vocab_size

    return open_session(tiny, Tokenizer())


def held(tree) -> int:
    """Bytes on the first device."""
    first = jax.devices()[0]
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == first
    )


def test_bytes_are_those_of_the_arrays_of_a_run(planned, session):
    _, state = session.recipe.create()
    memory = planned["bytes_per_device"]
    assert memory["parameters"] == held(state.params)
    assert memory["optimizer"] == held(state.opt_state)
    batch = {name: np.zeros((8, 32), np.int32) for name in ("inputs", "targets")}
    assert memory["batch"] == 3 * held(session.place(batch))


def test_memory_and_collectives_are_those_of_the_program_of_a_run(planned, session):
    names = ("inputs", "targets", "segments", "positions", "bytes", "domains")
    batch = {name: np.ones((8, 32), np.int32) for name in names}
    _, state = session.recipe.create()
    with jax.set_mesh(session.mesh):
        program = session.train_step.lower(state, session.place(batch)).compile()
    assert planned["collectives"] == summary(collectives(program.as_text(), session.mesh))
    used = program.memory_analysis()
    assert planned["bytes_per_device"]["temporaries"] == used.temp_size_in_bytes
    state_bytes = sum(planned["bytes_per_device"][k] for k in ("parameters", "optimizer", "other"))
    assert state_bytes == pytest.approx(used.alias_size_in_bytes, rel=0.1)


def test_the_formula_of_the_exchange_is_what_xla_compiles(planned):
    def exchanged(records):
        return sum(r["bytes"] for r in records if r["kind"] == "all-to-all")

    assert exchanged(planned["collectives"]) == exchanged(planned["expected_collectives"]) > 0


def test_the_compiled_program_computes_what_the_formula_counts(planned):
    done, formula = planned["compiled_flops"], planned["flops_per_step"]
    # On CPUs attention also computes masked scores, which are not needed.
    assert done["total"] == pytest.approx(formula["hardware"], rel=0.03)
    assert done["of_needed"] == done["total"] / formula["needed"] > 1
    assert done["kernels"] == done["attention_kernels"] == 0


def test_kernels_of_attention_count_their_products_and_others_are_unknown():
    kernels = ("splash_mha_fwd_segmented_residuals", "splash_mha_dq_no_residuals", "another")
    assert [_products_per_score(kernel) for kernel in kernels] == [2, 3, None]


def test_a_plan_is_json_and_has_a_page(planned):
    assert json.loads(json.dumps(planned)) == planned
    assert planned["compiled"]["ok"]
    assert planned["roofline"] is None
    text = page.plan(planned)
    assert "fsdp=2 x expert=4" in text
    assert "all-to-all over expert" in text


def test_a_gpu_cluster_is_planned_by_formula(tiny):
    found = plan(tiny, topology.parse("h100:8"))
    assert found["compiled"] is None
    assert found["fits"]
    assert 0 < found["roofline"]["mfu"] < 1
    assert found["collectives"] == found["expected_collectives"]
    assert "by formula" in page.plan(found)


def test_sweeps_rank_what_fits_by_time(tiny):
    found = sweep(tiny, topology.parse("h100:2"), limit=0)
    times = [one["roofline"]["step_seconds"] for one in found]
    assert times == sorted(times)
    tried = {(tuple(one["mesh"].values()), one["remat"]) for one in found}
    assert len(tried) == len(found) == len(list(variants(tiny, 2)))
    assert {one["remat"] for one in found} == {"none", "dots_no_batch", "full"}
    assert page.sweep({"name": "tiny", "plans": found}).count("\n") == len(found)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("exprt=8", "did you mean 'expert'"),
        ("expert=x", "needs a number"),
        ("data=4,expert=3", "data=4 x expert=3 makes 12 devices, not the 8 of cpu:8"),
        ("expert=3", "makes 3 devices, which does not divide the 8 of cpu:8"),
    ],
)
def test_meshes_that_are_refused(text, said):
    with pytest.raises(ConfigError, match=said):
        parse_mesh(text, 8, "cpu:8")


def test_meshes():
    assert parse_mesh("expert=4", 8, "cpu:8") == MeshConfig(data=2, expert=4)
    assert parse_mesh("data=2, expert=4", 8, "cpu:8").sizes == (2, 1, 4, *(1,) * (len(AXES) - 3))
    with pytest.raises(ConfigError, match="makes 4 devices"):
        fitted(MeshConfig(data=4), 8, "cpu:8")


def test_a_model_that_does_not_divide_is_refused_before_anything_is_traced(tiny):
    odd = dataclasses.replace(tiny, mesh=MeshConfig(data=1, model=8))
    with pytest.raises(ConfigError, match="num_heads=2 is not divisible"):
        plan(odd, EIGHT)


def command(*arguments: str) -> subprocess.CompletedProcess:
    tiny = (
        "--config=configs/quickstart.py",
        "--config.model.num_layers=2",
        "--config.model.width=128",
        "--config.model.scan_layers=True",
        "--config.data.vocab_size=512",
    )
    # As from a shell: the tests' own devices must not leak into it.
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return subprocess.run(
        [sys.executable, "-m", "moe_jax.plan", *tiny, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="the extra tpu is not installed")
def test_a_tpu_program_is_compiled_without_a_tpu():
    done = command("--topology=v5e:2x2", "--mesh=fsdp=2,expert=2")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["compiled"]["ok"]
    assert found["fits"]
    assert len(found["compiled"]["largest_buffers"]) == 3
    assert found["bytes_per_device"]["peak"] < found["bytes_per_device"]["hbm"]
    kinds = {(one["kind"], *one["axes"]) for one in found["collectives"]}
    assert ("all-to-all", "expert") in kinds
    assert ("all-gather", "fsdp") in kinds
    assert 0 < found["roofline"]["mfu"] < 1


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="the extra tpu is not installed")
def test_a_float32_model_on_a_tpu_sends_three_quarters_of_its_slots():
    # Rounded to bfloat16: the slots that experts read, forward, recomputed and backward. Whole:
    # those that experts have computed, which the products of the transport read to the last bit.
    settings = ("transport=einsum", "router.preset=gshard", "num_experts=4")
    done = command(
        "--topology=v4:2x2x1",
        "--mesh=expert=4",
        "--config.model.compute_dtype=float32",
        "--config.model.remat=full",
        *(f"--config.model.moe.{setting}" for setting in settings),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)

    def exchanged(records):
        return sum(one["bytes"] for one in records if one["kind"] == "all-to-all")

    formula = exchanged(found["expected_collectives"])
    assert exchanged(found["collectives"]) == pytest.approx(0.75 * formula, rel=0.01)


def test_a_wrong_topology_is_one_line():
    done = command("--topology=v7:2x2")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --topology: no chip is called 'v7'")
    assert done.stderr.count("\n") == 1
