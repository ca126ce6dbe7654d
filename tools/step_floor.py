"""Compares train steps with their matrix products and with the memory that they must move.

``python -m tools.step_floor`` compiles the train step of each model of ``STEPS`` here. It measures
in interleaved rounds the whole step, every matrix product of the compiled program alone, and a
copy of a large array. It writes ``experiments/benchmarks/cpu_floor.json`` and the table of
``docs/benchmarks.md``. Nothing else should run meanwhile.

The bytes that a step must move are those of an update by Adam (parameters, two moments and
gradients are read and written once), and the values of the forward pass that the backward pass
reads (written and read once). The time of a call that computes nothing is subtracted from every
product.
"""

from __future__ import annotations

import collections
import functools
import json
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from moe_jax import files
from moe_jax.benchmark.steps import SETTINGS
from moe_jax.cli import common
from moe_jax.config.experiment import Experiment
from moe_jax.config.loading import experiment_of
from moe_jax.parallel import MeshConfig, make_mesh
from moe_jax.planning import expected, hlo
from moe_jax.planning.compile import Step, make_step
from moe_jax.training.optimizer import optimizer_of
from moe_jax.training.state import Recipe
from tools.plans import write_table

_MARKS = ("<!-- floor -->\n", "<!-- end of floor -->")
_OLMOE = {
    **SETTINGS,
    "model.moe.num_experts": 64,
    "model.moe.router.k": 8,
    "model.moe.expert_dim": 128,
}
# Name of a model here, the config that it changes, and the settings that it changes.
STEPS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "quickstart": ("quickstart", {}),
    "Mixtral-shaped": ("mixtral_8x7b", SETTINGS),
    "OLMoE-shaped": ("mixtral_8x7b", _OLMOE),
}
_ROUNDS = 7
_COPIED = 2**24
_AXES = re.compile(r"(lhs|rhs)_(contracting|batch)_dims=\{([\d,]*)\}")

Run = Callable[[], Any]
# Types of both operands, and the axes of each that are contracted and that are a batch.
Product = tuple[str, str, tuple[tuple[str, tuple[int, ...]], ...]]


def products(text: str) -> dict[Product, int]:
    """Returns the executions of each matrix product of a program compiled for a CPU.

    A loop of unknown length, over blocks of an expert's rows, counts as one round.
    """
    program = hlo.parse(text)
    found: collections.Counter[Product] = collections.Counter()
    for name, times in program.times.items():
        for one in program.computations[name]:
            if one.operation == "dot":
                left, right = hlo.operands(one, program.computations[name])[:2]
                axes = tuple(
                    (f"{side}_{kind}", tuple(int(axis) for axis in numbers.split(",") if axis))
                    for side, kind, numbers in _AXES.findall(one.line)
                )
                found[hlo.arrays(left)[0], hlo.arrays(right)[0], axes] += times
    return dict(found)


def _array(type_: str) -> jax.Array:
    kind, _, sizes = type_.rstrip("]").partition("[")
    shape = [int(size) for size in sizes.split(",") if size]
    dtype = {"f32": jnp.float32, "bf16": jnp.bfloat16}[kind]
    return jax.random.normal(jax.random.key(0), shape, dtype)


def _multiplying(product: Product) -> Run:
    left, right, named = product
    axes = dict(named)
    dims = (
        (axes.get("lhs_contracting", ()), axes.get("rhs_contracting", ())),
        (axes.get("lhs_batch", ()), axes.get("rhs_batch", ())),
    )
    x, y = _array(left), _array(right)
    call = jax.jit(functools.partial(jax.lax.dot_general, dimension_numbers=dims))
    return lambda: jax.block_until_ready(call(x, y))


def _stepping(experiment: Experiment, step: Step, compiled: Any) -> Run:
    optimizer = optimizer_of(experiment)
    recipe = Recipe(experiment.model, experiment.vocab_size, optimizer, 0, step.mesh)
    _, state = recipe.create()
    shapes = step.batch
    batch = {name: jnp.ones(shape.shape, shape.dtype) for name, shape in shapes.items()}
    tokens = jax.random.randint(
        jax.random.key(0), batch["inputs"].shape, 0, experiment.vocab_size, jnp.int32
    )
    places = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    batch |= {"inputs": tokens, "targets": jnp.roll(tokens, -1, 1)}
    batch["positions"] = jnp.broadcast_to(places, tokens.shape)
    batch = {name: jax.device_put(batch[name], shapes[name].sharding) for name in shapes}

    def run() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(compiled(state, batch))

    return run


def measure(name: str) -> dict[str, Any]:
    """Returns the figures of one model of ``STEPS``."""
    config, settings = STEPS[name]
    experiment = experiment_of(config, settings)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    step = make_step(experiment, mesh)
    with jax.set_mesh(mesh):
        compiled = step.function.lower(step.state, step.batch).compile()
        calls: dict[Any, Run] = {"step": _stepping(experiment, step, compiled)}
        times = products(compiled.as_text())
        calls |= {product: _multiplying(product) for product in times}
        large = jnp.ones((_COPIED,), jnp.float32)
        add = jax.jit(lambda x: x + 1)
        nothing = jnp.zeros(())
        calls["nothing"] = lambda: jax.block_until_ready(add(nothing))
        calls["copy"] = lambda: jax.block_until_ready(add(large))
        seconds = _interleaved(calls)
    multiplied = sum(
        max(seconds[product] - seconds["nothing"], 0.0) * number
        for product, number in times.items()
    )
    size = step.bytes
    kept = expected.needed_activations(experiment, step)
    moved = 8 * size.parameters + 2 * kept
    bandwidth = 2 * large.nbytes / seconds["copy"]
    floor = multiplied + moved / bandwidth
    return {
        "name": name,
        "step_seconds": seconds["step"],
        "product_seconds": multiplied,
        "moved_bytes": moved,
        "bytes_per_second": bandwidth,
        "moved_seconds": moved / bandwidth,
        "over_floor": seconds["step"] / floor,
    }


def _interleaved(calls: Mapping[Any, Run]) -> dict[Any, float]:
    """Returns the median seconds of each call, of rounds that call each of them once."""
    spent: dict[Any, list[float]] = {key: [] for key in calls}
    for call in calls.values():
        call()
    for _ in range(_ROUNDS):
        for key, call in calls.items():
            began = time.perf_counter()
            call()
            spent[key].append(time.perf_counter() - began)
    return {key: statistics.median(values) for key, values in spent.items()}


def table(records: list[dict[str, Any]]) -> str:
    """Returns the table of all models."""
    lines = [
        "| train step | ms | products, ms | memory that must move, ms | step / both |\n",
        "|---|---|---|---|---|\n",
    ]
    for one in records:
        times = (one["step_seconds"], one["product_seconds"], one["moved_seconds"])
        cells = [f"{1e3 * seconds:.0f}" for seconds in times]
        lines.append(f"| {one['name']} | {' | '.join(cells)} | {one['over_floor']:.2f} |\n")
    return "".join(lines)


def define(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string(
        "output",
        "experiments/benchmarks/cpu_floor.json",
        "File of the figures.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "page", "docs/benchmarks.md", "Page that shows the table.", flag_values=values
    )


def main(given: flags.FlagValues) -> None:
    """Measures every model and writes figures and table."""
    records = []
    for name in STEPS:
        print(f"{name} ...", flush=True)
        records.append(measure(name))
    with files.replaced(Path(given.output)) as temporary:
        temporary.write_text(json.dumps(records, indent=2) + "\n")
    write_table(Path(given.page), table(records), _MARKS)


if __name__ == "__main__":
    common.run(define, main)
