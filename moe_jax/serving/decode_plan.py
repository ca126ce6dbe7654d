"""Plans the decoding of an engine: one step of all its requests, compiled for another machine."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from moe_jax.config.experiment import Experiment
from moe_jax.counting.count import count
from moe_jax.errors import ConfigError
from moe_jax.models import Decoder
from moe_jax.models.stack import StackCache
from moe_jax.parallel import make_mesh
from moe_jax.parallel.mesh import AXES
from moe_jax.planning.collectives import Collective, collectives, summary
from moe_jax.planning.compile import Compiled, compile_program, device_bytes, needed_memory
from moe_jax.planning.links import wires
from moe_jax.planning.topology import Topology
from moe_jax.serving.decode_work import Decoding, Reads, model_flops, reads, touched
from moe_jax.serving.engine import checked
from moe_jax.serving.program import StepShape, abstract_pages, lowered
from moe_jax.training.state import Recipe

# Number of most likely tokens that the step returns beside the sampled one.
_TOP = 20


@dataclasses.dataclass(frozen=True)
class DecodeBounds:
    """Lower bounds on the seconds of one step.

    Attributes:
        compute: Seconds of the model's FLOPs at the peak of the chips.
        parameters: Seconds in which a device reads its parameters at full bandwidth.
        cache: Seconds in which a device reads the cache of its requests at full bandwidth.
        links: Seconds of all collectives; each blocks the next operation.
    """

    compute: float
    parameters: float
    cache: float
    links: float

    @property
    def step(self) -> float:
        """Seconds of the whole step: reading and products overlap, collectives do not."""
        return max(self.compute, self.parameters + self.cache) + self.links

    @property
    def bound(self) -> str:
        """Name of the resource that takes longest."""
        sides = dataclasses.asdict(self)
        return max(sides, key=lambda name: sides[name])

    def record(self, batch: int) -> dict[str, Any]:
        """Returns the bounds of a step of ``batch`` tokens as plain data."""
        seconds = {f"{name}_seconds": value for name, value in dataclasses.asdict(self).items()}
        rate = {"step_seconds": self.step, "tokens_per_second": batch / self.step}
        return seconds | rate | {"bound": self.bound}


def plan_decoding(experiment: Experiment, topology: Topology, decoding: Decoding) -> dict[str, Any]:
    """Returns the plan of one decode step of an ``Engine``, as plain data.

    The parameters have the type of activations, as those of a model that is imported in this type.

    Args:
        experiment: The experiment, with a resolved mesh; its data and its training are not read.
        topology: The machine.
        decoding: The requests.

    Raises:
        ConfigError: If the machine has GPUs, the mesh does not divide the model, or an engine
            cannot run the model.
    """
    if topology.chip.kind == "gpu":
        raise ConfigError(
            f"a decode step is compiled, and {topology.name} has GPUs: choose a TPU or cpu:8"
        )
    experiment.check_model(experiment.mesh)
    mesh = make_mesh(experiment.mesh, topology.devices())
    model = abstract_model(experiment, mesh, decoding)
    with jax.set_mesh(mesh):
        pages = abstract_pages(model, decoding.entries)
    held = {"parameters": device_bytes(jax.tree.leaves(model)), "cache": device_bytes(pages)}
    program = _compiled(experiment, model, pages, decoding, mesh, sum(held.values()))
    memory = held | needed_memory(program, sum(held.values()), int(topology.chip.device_hbm))
    sent = collectives(program.text, mesh) if program.text else []
    read, needed = reads(model, pages, decoding, experiment.mesh), model_flops(model, decoding)
    bounds = _bounds(topology, mesh, needed, read, sent)
    return {
        **_header(experiment, topology, decoding),
        "compiled": program.record(),
        "fits": memory["fits"],
        "bytes_per_device": memory,
        "bytes_read_per_device": dataclasses.asdict(read),
        "collectives": summary(sent),
        "flops_per_step": needed,
        "roofline": bounds and bounds.record(decoding.batch),
        "sources": list(topology.chip.sources),
    }


def abstract_model(experiment: Experiment, mesh: Mesh, decoding: Decoding) -> Decoder:
    """Returns the model with shapes and shardings in place of arrays.

    Raises:
        ConfigError: If an engine cannot run the model.
    """
    recipe = Recipe(experiment.model, experiment.vocab_size, optax.identity(), 0, mesh)
    graph, state = recipe.abstract()
    dtype = jnp.dtype(experiment.model.compute_dtype)
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), state.params
    )
    return checked(nnx.merge(graph, params, state.router_state), decoding.context)


def _compiled(
    experiment: Experiment,
    model: Decoder,
    pages: StackCache,
    decoding: Decoding,
    mesh: Mesh,
    held: int,
) -> Compiled:
    """Returns the compiler's numbers for the step, whose inputs take ``held`` bytes per device."""
    shape = StepShape(decoding.batch, 0, decoding.pages, decoding.page)
    top = min(_TOP, experiment.vocab_size)
    found = compile_program(lambda: lowered(model, pages, shape, top), mesh)
    return without_inputs(found, held) if found.error else found


def without_inputs(found: Compiled, held: int) -> Compiled:
    """Returns the numbers of a program that does not fit; its inputs are no temporaries.

    The report of the compiler adds the inputs, ``held`` bytes, to the temporaries.
    """
    total = found.peak or found.temporaries
    return dataclasses.replace(found, temporaries=max(total - held, 0), peak=total)


def _header(experiment: Experiment, topology: Topology, decoding: Decoding) -> dict[str, Any]:
    cost = count(experiment.model, experiment.vocab_size, decoding.context)
    layers = experiment.model.sparse_layers()
    shares = {layer.setting: touched(layer.moe, decoding.batch) for layer in layers}
    return {
        "name": experiment.name,
        "parameters": cost.total + cost.lookahead,
        "topology": topology.name,
        "chips": topology.num_chips,
        "devices": topology.num_devices,
        "mesh": dict(zip(AXES, experiment.mesh.sizes, strict=True)),
        "type": experiment.model.compute_dtype,
        "group_size": {layer.setting: layer.moe.group_size for layer in layers},
        "decoding": dataclasses.asdict(decoding),
        "touched_experts": shares,
    }


def _bounds(
    topology: Topology, mesh: Mesh, needed: float, read: Reads, sent: list[Collective]
) -> DecodeBounds | None:
    """Returns the bounds of a step; ``None`` if the peak of the chip is not published."""
    chip = topology.chip
    if not chip.flops:
        return None
    under = wires(topology, dict(mesh.shape), np.asarray(mesh.devices))
    return DecodeBounds(
        compute=needed / (topology.num_chips * chip.flops),
        parameters=(read.dense + read.experts) / chip.device_bandwidth,
        cache=read.cache / chip.device_bandwidth,
        links=sum(under.seconds(one) for one in sent),
    )
