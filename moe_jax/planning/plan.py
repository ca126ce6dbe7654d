"""A plan: what one experiment needs of one machine, compiled or by formula, as plain data."""

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
from moe_jax.planning import expected, roofline
from moe_jax.planning.collectives import Collective, collectives, summary
from moe_jax.planning.compile import Compiled, Step, compile_step, make_step
from moe_jax.planning.links import wires
from moe_jax.planning.topology import Topology

_POLICIES: tuple[Remat, ...] = ("none", "dots_no_batch", "full")


def parse_mesh(text: str, num_devices: int, name: str) -> MeshConfig:
    """Returns the mesh that ``text`` such as ``data=16,expert=64`` names.

    An axis left out is 1; ``data`` takes what is left over.

    Args:
        text: axes and sizes.
        num_devices: of the machine.
        name: of the machine, for messages.

    Raises:
        ConfigError: if an axis is unknown or the product is wrong.
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
    """Returns the mesh with ``data`` filled in.

    Raises:
        ConfigError: if its product is not the number of devices, saying both.
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
    """Returns the plan of an experiment whose mesh is resolved.

    Args:
        experiment: what is to run.
        topology: on what.
        compiled: whether to compile; a GPU's plan never does.

    Raises:
        ConfigError: if mesh, batch and model do not go together, before anything expensive.
    """
    experiment.check_program(topology.num_devices)
    compiled = compiled and topology.chip.kind != "gpu"
    mesh = _mesh(experiment.mesh, topology, real=compiled)
    step = make_step(experiment, mesh)
    formula = expected.expected_collectives(experiment, step)
    program = compile_step(step) if compiled else None
    sent = collectives(program.text, mesh) if program and program.text else formula
    memory = _memory(experiment, step, program, topology)
    return {
        **_header(experiment, topology),
        "compiled": _compiled(program),
        "fits": memory["fits"],
        "bytes_per_device": memory,
        "collectives": summary(sent),
        "expected_collectives": summary(formula),
        "flops_per_step": _flops(experiment),
        "roofline": _roofline(experiment, step, sent, topology),
        "sources": list(topology.chip.sources),
    }


def _mesh(config: MeshConfig, topology: Topology, *, real: bool) -> Mesh:
    """The mesh of devices, or without any: shapes and shardings need none."""
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
        "transport": {layer.setting: layer.moe.transport for layer in routed},
        "batch": {
            "rows": experiment.data.batch_size,
            "length": experiment.data.seq_length,
            "target_length": experiment.data.target_length,
            "tokens": experiment.tokens_per_step,
        },
    }


def _compiled(program: Compiled | None) -> dict[str, Any] | None:
    if program is None:
        return None
    return {
        "ok": not program.error,
        "seconds": round(program.seconds, 1),
        "error": program.error,
        "largest_buffers": [dataclasses.asdict(buffer) for buffer in program.largest],
    }


def _memory(
    experiment: Experiment, step: Step, program: Compiled | None, topology: Topology
) -> dict[str, Any]:
    """Bytes per device; ``temporaries`` hold activations and gradients too.

    ``activations`` is traced, ``temporaries`` the compiler's, and ``peak`` is these and the state.
    Without a compiler, temporaries are gradients (twice if microbatches add them up), kept
    activations, what one layer recomputes, and logits with their gradient.
    """
    state = step.bytes
    activations = expected.kept_activations(experiment, step)
    logits = expected.logits_bytes(experiment, dict(step.mesh.shape))
    copies = 1 if experiment.training.microbatches == 1 else 2
    held = sum(dataclasses.astuple(state))
    if program is None:
        temporaries = copies * state.parameters + activations + 2 * logits
        temporaries += expected.working_set(experiment, step)
        peak, limit = held + temporaries, int(topology.chip.device_hbm)
    else:
        temporaries = program.temporaries
        peak = program.peak or held + temporaries
        limit = program.limit or int(topology.chip.device_hbm)
    # The compiler refuses temporaries that exceed the memory, but leaves the state out of the sum.
    fits = not (program and program.error) and (not limit or peak <= limit)
    return {
        **dataclasses.asdict(state),
        "activations": activations,
        "temporaries": temporaries,
        "peak": peak,
        "hbm": limit or None,
        "missing": max(peak - limit, 0) if limit and not fits else 0,
        "fits": fits,
    }


def _flops(experiment: Experiment) -> dict[str, float]:
    work = roofline.work(experiment)
    return {**dataclasses.asdict(work), "hardware": work.hardware}


def _roofline(
    experiment: Experiment, step: Step, sent: list[Collective], topology: Topology
) -> dict[str, Any] | None:
    if not topology.chip.flops:
        return None
    devices = np.asarray(step.mesh.devices) if isinstance(step.mesh, Mesh) else None
    under = wires(topology, dict(step.mesh.shape), devices)
    return roofline.record(roofline.roofline(experiment, step, sent, under))


def variants(experiment: Experiment, num_devices: int) -> Iterator[Experiment]:
    """Yields the meshes and policies of a sweep that the batch and the model divide into.

    ``fsdp`` and ``expert`` take powers of two and the experts' largest shard, ``model`` 1 to 8,
    ``data`` what is left; each with every policy of rematerialisation.
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
    """Returns plans of other meshes and policies, ranked: those that fit, by predicted time.

    All are ranked by formula first; the best ``limit`` are compiled and ranked again in front.

    Args:
        experiment: what is to run.
        topology: on what.
        limit: how many are compiled at most.
        stop: says, after each plan, whether to leave out the rest of the formulas and of the
            compilations.
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
    return sorted(plans, key=_rank) + [found for found, _ in tried[len(plans) :]]


def _rank(found: dict[str, Any]) -> tuple[bool, float, int]:
    time = found["roofline"]["step_seconds"] if found["roofline"] else 0.0
    return (not found["fits"], time, found["bytes_per_device"]["peak"])
