"""Plans an experiment on a machine: memory, collectives and time, compiled or by formula."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, get_args

import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from moe_jax.config.experiment import Experiment
from moe_jax.counting.count import count
from moe_jax.errors import ConfigError, nearest
from moe_jax.models.stack import Remat
from moe_jax.parallel import MeshConfig, make_mesh
from moe_jax.parallel.mesh import AXES
from moe_jax.planning import expected, flops, roofline
from moe_jax.planning.collectives import Collective, collectives, summary
from moe_jax.planning.compile import Compiled, Step, compile_step, make_step, needed_memory
from moe_jax.planning.links import wires
from moe_jax.planning.topology import Topology
from moe_jax.transport import implementation

# Products per score of the kernels of attention; the backward kernels compute scores again.
_SCORES = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
_POLICIES: tuple[Remat, ...] = ("none", "dots_no_batch", "full")


def parse_mesh(text: str, num_devices: int, name: str) -> MeshConfig:
    """Returns the mesh of a text such as ``data=16,expert=64``.

    An axis that is missing has size 1, except ``data``, which takes the remaining devices.

    Args:
        text: Axes and sizes.
        num_devices: Number of devices of the machine.
        name: Name of the machine, for messages.

    Raises:
        ConfigError: If an axis is unknown, or the sizes do not fit the number of devices.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES:
            raise ConfigError(f"--mesh: no axis is called {axis!r}{nearest(axis, AXES)}")
        if not size.isdigit() or int(size) < 1:
            raise ConfigError(f"--mesh: {axis}={size or '?'} needs a number of devices from 1")
        sizes[axis] = int(size)
    return fitted(MeshConfig(**sizes), num_devices, name)


def fitted(mesh: MeshConfig, num_devices: int, name: str) -> MeshConfig:
    """Returns the mesh with the remaining devices on ``data`` if its size is -1.

    Args:
        mesh: The mesh.
        num_devices: Number of devices of the machine.
        name: Name of the machine, for messages.

    Raises:
        ConfigError: If the product of the sizes is not the number of devices.
    """
    product = math.prod(size for size in mesh.sizes if size > 0)
    if mesh.data == -1 and num_devices % product == 0:
        return mesh.resolve(num_devices)
    if mesh.data == -1 or product != num_devices:
        axes = " x ".join(
            f"{axis}={size}" for axis, size in zip(AXES, mesh.sizes, strict=True) if size > 1
        )
        relation = "which does not divide" if mesh.data == -1 else "not"
        raise ConfigError(
            f"the mesh {axes or 'of 1 device'} makes {product} devices, {relation} the "
            f"{num_devices} of {name}: change --mesh or --topology"
        )
    return mesh


def plan(experiment: Experiment, topology: Topology, *, compiled: bool = True) -> dict[str, Any]:
    """Returns the plan of an experiment with a resolved mesh, as plain data.

    Args:
        experiment: The experiment.
        topology: The machine.
        compiled: True compiles the step; a plan for GPUs is never compiled.

    Raises:
        ConfigError: If mesh, batch and model do not fit together; the check precedes compilation.
    """
    experiment.check_program(topology.num_devices)
    compiled = compiled and topology.chip.kind != "gpu"
    mesh = _mesh(experiment.mesh, topology, real=compiled)
    step = make_step(experiment, mesh)
    formula = expected.expected_collectives(experiment, step)
    program = compile_step(step) if compiled else None
    sent = collectives(program.text, mesh) if program and program.text else formula
    memory = _memory(experiment, step, program, topology)
    done = _compiled_flops(experiment, program, topology.num_devices)
    return {
        **_header(experiment, topology),
        "compiled": program and program.record(),
        "fits": memory["fits"],
        "bytes_per_device": memory,
        "collectives": summary(sent),
        "expected_collectives": summary(formula),
        "flops_per_step": _flops(experiment),
        "compiled_flops": done,
        "roofline": _roofline(experiment, step, sent, topology, done),
        "sources": list(topology.chip.sources),
    }


def _mesh(config: MeshConfig, topology: Topology, *, real: bool) -> Mesh | AbstractMesh:
    """Returns a mesh of devices, or an abstract one, which suffices for shapes and shardings."""
    if real:
        return make_mesh(config, topology.devices())
    return AbstractMesh(config.sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _header(experiment: Experiment, topology: Topology) -> dict[str, Any]:
    cost = count(experiment.model, experiment.vocab_size, experiment.sequence)
    routed = experiment.model.sparse_layers()
    return {
        "name": experiment.name,
        "parameters": cost.total + cost.lookahead,
        "topology": topology.name,
        "chips": topology.num_chips,
        "devices": topology.num_devices,
        "mesh": dict(zip(AXES, experiment.mesh.sizes, strict=True)),
        "remat": experiment.model.remat,
        "microbatches": experiment.training.microbatches,
        "loss_chunk": experiment.training.loss_chunk,
        "group_size": {layer.setting: layer.moe.group_size for layer in routed},
        "transport": {
            layer.setting: implementation(layer.moe, experiment.mesh.expert).transport
            for layer in routed
        },
        "batch": {
            "rows": experiment.data.batch_size,
            "length": experiment.data.seq_length,
            "target_length": experiment.data.target_length,
            "tokens": experiment.tokens_per_step,
        },
    }


def _memory(
    experiment: Experiment, step: Step, program: Compiled | None, topology: Topology
) -> dict[str, Any]:
    """Returns the bytes per device by use; ``temporaries`` include activations and gradients.

    The tracer gives ``activations`` and the compiler ``temporaries``; ``peak`` is the sum of
    temporaries and state. Without a compiler, temporaries are the sum of gradients (twice if
    microbatches accumulate them), kept activations, recomputed values of one layer, and logits with
    their gradient.
    """
    state = step.bytes
    activations = expected.kept_activations(experiment, step)
    logits = expected.logits_bytes(experiment, dict(step.mesh.shape))
    copies = 1 if experiment.training.microbatches == 1 else 2
    held = sum(dataclasses.astuple(state))
    if program is None:
        temporaries = copies * state.parameters + activations + 2 * logits
        program = Compiled(temporaries=temporaries + expected.working_set(experiment, step))
    needed = needed_memory(program, held, int(topology.chip.device_hbm))
    return {**dataclasses.asdict(state), "activations": activations, **needed}


def _flops(experiment: Experiment) -> dict[str, float]:
    work = roofline.work(experiment)
    return {**dataclasses.asdict(work), "needed": work.needed, "hardware": work.hardware}


def _compiled_flops(
    experiment: Experiment, program: Compiled | None, devices: int
) -> dict[str, Any] | None:
    """Returns the FLOPs of a step on all devices as the compiled program computes them.

    A kernel of attention has no cost estimate: it counts with the products that it computes for
    each unmasked score of an average layer. ``of_needed`` relates the sum to ``Work.needed``; it is
    ``None`` if the program has another kernel without an estimate.
    """
    if program is None or program.error:
        return None
    counted, work = flops.count(program.text), roofline.work(experiment)
    unknown = counted.without_estimate
    of_scores = {kernel: _products_per_score(kernel) for kernel in unknown}
    passes = sum(times * (of_scores[kernel] or 0) for kernel, times in unknown.items())
    layers = len(experiment.model.attentions()) * experiment.training.microbatches
    # The forward pass has two products per score.
    attention = passes / 2 * work.scores / layers
    total = (counted.products + counted.kernels) * devices + attention
    return {
        "products": counted.products * devices,
        "kernels": counted.kernels * devices,
        "attention_kernels": attention,
        "without_estimate": unknown,
        "total": total,
        "of_needed": None if None in of_scores.values() else total / work.needed,
    }


def _products_per_score(kernel: str) -> int | None:
    """Returns the products per score of a kernel of attention; ``None`` for other kernels."""
    return next((products for name, products in _SCORES.items() if name in kernel), None)


def _roofline(
    experiment: Experiment,
    step: Step,
    sent: list[Collective],
    topology: Topology,
    done: dict[str, Any] | None,
) -> dict[str, Any] | None:
    if not topology.chip.flops:
        return None
    devices = np.asarray(step.mesh.devices) if isinstance(step.mesh, Mesh) else None
    under = wires(topology, dict(step.mesh.shape), devices)
    total = done["total"] if done else None
    return roofline.record(roofline.roofline(experiment, step, sent, under, total))


def variants(experiment: Experiment, num_devices: int) -> Iterator[Experiment]:
    """Yields the experiment with every mesh and rematerialisation policy of a sweep.

    The axis ``fsdp`` takes all powers of two, ``expert`` 1 and the three largest powers of two that
    divide the experts, ``model`` 1 to 8, and ``data`` the remaining devices. Meshes that do not
    divide the batch or the model are omitted.
    """
    for mesh in _meshes(experiment, num_devices):
        for remat in _POLICIES:
            assert remat in get_args(Remat)
            model = dataclasses.replace(experiment.model, remat=remat)
            one = dataclasses.replace(experiment, mesh=mesh, model=model)
            try:
                one.check_program(num_devices)
            except ConfigError:
                break
            yield one


def _meshes(experiment: Experiment, num_devices: int) -> Iterator[MeshConfig]:
    experts = [layer.moe.num_experts for layer in experiment.model.sparse_layers()] or [1]
    powers = [n for n in _divisors(num_devices) if n & (n - 1) == 0]
    of_experts = [n for n in powers if all(e % n == 0 for e in experts)]
    chosen = sorted({1, *of_experts[-3:]})
    for expert, model, fsdp in itertools.product(chosen, (1, 2, 4, 8), powers):
        if num_devices % (expert * model * fsdp) == 0:
            data = num_devices // (expert * model * fsdp)
            yield MeshConfig(data=data, expert=expert, model=model, fsdp=fsdp)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def sweep(
    experiment: Experiment,
    topology: Topology,
    limit: int,
    stop: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]]:
    """Returns the plans of all meshes and policies; plans that fit come first, by predicted time.

    All plans are first ranked by formula. The best ``limit`` plans are then compiled, ranked again,
    and returned before the others.

    Args:
        experiment: The experiment.
        topology: The machine.
        limit: Largest number of compiled plans.
        stop: Function called after each plan by formula and before each compilation; if it returns
            True, the remaining formulas or compilations are omitted.

    Raises:
        ConfigError: If no mesh divides the batch and the model.
    """
    tried = []
    for one in variants(experiment, topology.num_devices):
        tried.append((plan(one, topology, compiled=False), one))
        if stop():
            break
    if not tried:
        raise ConfigError(
            f"no mesh over the {topology.num_devices} devices of {topology.name} divides the batch"
            " and the model: change data.batch_size or training.microbatches"
        )
    tried.sort(key=lambda pair: _rank(pair[0]))
    best = tried[:limit] if topology.chip.kind != "gpu" else []
    plans: list[dict[str, Any]] = []
    for _, one in best:
        if stop():
            break
        plans.append(plan(one, topology))
    return sorted(plans, key=_rank) + [record for record, _ in tried[len(plans) :]]


def _rank(record: dict[str, Any]) -> tuple[bool, float, int]:
    time = record["roofline"]["step_seconds"] if record["roofline"] else 0.0
    return (not record["fits"], time, record["bytes_per_device"]["peak"])
