"""Compiles the real training step for devices that need not exist, and reads its memory."""

from __future__ import annotations

import dataclasses
import math
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from moe_jax.config.experiment import Experiment
from moe_jax.errors import ConfigError
from moe_jax.models import DecoderConfig, EncoderDecoderConfig, ModelConfig
from moe_jax.parallel.rules import spec
from moe_jax.planning import hlo
from moe_jax.training.optimizer import optimizer_of
from moe_jax.training.state import Recipe, TrainState
from moe_jax.training.step import Objective, jit_train_step

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_USED = re.compile(r"Used ([\d.]+)([KMGT]?)i?B? of ([\d.]+)([KMGT]?)i?B? hbm")
_TEMPORARIES = re.compile(
    r"HLO temporaries \(([\d.]+)([KMGT]?)i?B?\) exceeds available HBM \(([\d.]+)([KMGT]?)"
)
_ROW = re.compile(r"^ *[\d.]+[KMGT]?i?B\( *\d+%\); +([\d.]+)([KMGT]?)i?B; +\d+; +\d+; (.*)$", re.M)
# Operations that name or group other values, or whose buffer belongs to the caller.
_NO_BUFFER = {
    "bitcast",
    "conditional",
    "constant",
    "get-tuple-element",
    "parameter",
    "tuple",
    "while",
    "opt-barrier",
}


@dataclasses.dataclass(frozen=True)
class Buffer:
    """One value that a program holds on a device.

    Attributes:
        bytes: Size of the value.
        shape: Type and shape, such as ``f32[64,1024]``.
        operation: Operation that computes the value, by its name in the model's code if known.
    """

    bytes: int
    shape: str
    operation: str = ""


@dataclasses.dataclass(frozen=True)
class State:
    """Bytes per device of a step's inputs.

    Attributes:
        parameters: Bytes of the trained parameters.
        optimizer: Bytes of the optimizer's statistics.
        other: Bytes of the routers' state, counters and keys.
        batch: Bytes of the batch.
    """

    parameters: int
    optimizer: int
    other: int
    batch: int


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step that can be compiled.

    Attributes:
        function: The jitted step.
        state: Shapes and shardings of the state.
        batch: Shapes and shardings of the batch.
        mesh: Mesh of the devices; an ``AbstractMesh`` cannot be compiled for.
    """

    function: Any
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    mesh: Mesh | AbstractMesh

    @property
    def bytes(self) -> State:
        """Bytes per device of state and batch, from their shardings alone."""
        return State(
            parameters=device_bytes(self.state.params),
            optimizer=device_bytes(self.state.opt_state),
            other=device_bytes(
                (
                    self.state.router_state,
                    self.state.step,
                    self.state.key,
                    self.state.skipped,
                    self.state.skipped_in_row,
                )
            ),
            batch=device_bytes(self.batch),
        )


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's numbers for a step; all bytes are per device.

    Attributes:
        seconds: Time to lower and compile the step.
        text: The compiled program.
        arguments: Bytes of state and batch, with the padding of layouts; 0 if the program did not
            fit.
        temporaries: Bytes of all values that exist only within the step: activations, gradients,
            buffers of collectives.
        outputs: Bytes of the outputs, without the donated state.
        peak: Largest number of bytes at any time; 0 if the program did not fit and the compiler's
            message lacks the number.
        limit: Bytes of memory, if the program did not fit.
        error: Message of the compiler, if the program did not fit.
        largest: The largest buffers, at most three.
    """

    seconds: float = 0.0
    text: str = ""
    arguments: int = 0
    temporaries: int = 0
    outputs: int = 0
    peak: int = 0
    limit: int = 0
    error: str = ""
    largest: tuple[Buffer, ...] = ()

    def record(self) -> dict[str, Any]:
        """Returns the outcome as plain data."""
        return {
            "ok": not self.error,
            "seconds": round(self.seconds, 1),
            "error": self.error,
            "largest_buffers": [dataclasses.asdict(buffer) for buffer in self.largest],
        }


def make_step(experiment: Experiment, mesh: Mesh | AbstractMesh) -> Step:
    """Returns the training step of an experiment, without allocating memory.

    The batch has the number of tokens in the configuration, because the step does not depend on
    the data.
    """
    optimizer = optimizer_of(experiment)
    # The shapes and shardings of a recipe need axis sizes only, which an abstract mesh has too.
    sizes = cast(Mesh, mesh)
    recipe = Recipe(
        experiment.model, experiment.vocab_size, optimizer, experiment.training.seed, sizes
    )
    graph, state = recipe.abstract()
    function = jit_train_step(graph, optimizer, Objective.of(experiment), state)
    return Step(function, state, abstract_batch(experiment, mesh), mesh)


def abstract_batch(
    experiment: Experiment, mesh: Mesh | AbstractMesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and shardings of a batch of ``moe_jax.data.loader``."""
    data = experiment.data
    sharding = NamedSharding(mesh, spec("batch"))
    shapes = batch_shapes(experiment.model, data.batch_size, data.seq_length, data.target_length)
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
        for name, shape in shapes.items()
    }


def batch_shapes(
    model: ModelConfig, rows: int, length: int, targets: int
) -> dict[str, tuple[int, int]]:
    """Returns the shapes of the int32 arrays of a batch.

    Args:
        model: Configuration of the model.
        rows: Number of texts.
        length: Number of (encoder) input tokens per text.
        targets: Number of target tokens per text; 0 for a decoder.
    """
    names = ("inputs", "targets", "segments", "positions", "bytes", "domains")
    batch = dict.fromkeys(names, (rows, targets or length))
    if isinstance(model, DecoderConfig) and not model.causal:
        batch["predicted"] = (rows, length)
    if isinstance(model, EncoderDecoderConfig):
        batch |= dict.fromkeys(("encoder_inputs", "encoder_segments"), (rows, length))
    return batch


def device_bytes(tree: Any) -> int:
    """Returns the bytes per device of a tree of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def compile_step(step: Step) -> Compiled:
    """Compiles the whole step.

    A program that exceeds the memory of its devices gives a result with an ``error``.

    Raises:
        TypeError: If the mesh of the step has no devices.
        ConfigError: If the compiler refuses the program for another reason than memory.
    """
    if not isinstance(step.mesh, Mesh):
        raise TypeError("the step has an abstract mesh, which cannot be compiled for")
    return compile_program(lambda: step.function.lower(step.state, step.batch), step.mesh)


def compile_program(lower: Callable[[], jax.stages.Lowered], mesh: Mesh) -> Compiled:
    """Compiles a program for the devices of a mesh; see ``compile_step``.

    Args:
        lower: Function that lowers the program, called on the mesh.
        mesh: The mesh.

    Raises:
        ConfigError: If the compiler refuses the program for another reason than memory.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        lowered = lower()
        tpu = mesh.devices.flat[0].platform == "tpu"
        # Only the dump names the buffers. It exists even if the program does not fit.
        dump: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            compiled = lowered.compile(compiler_options=dump if tpu else None)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise refused(str(error)) from error
            result = out_of_memory(str(error), _dumped(folder, "oom_intermediate_module"))
        else:
            result = _fitting(compiled)
        report = _dumped(folder, "after_optimizations-memory-usage-report")
    seconds = time.perf_counter() - began
    largest = largest_allocations(report) or largest_values(result.text)
    temporaries = result.temporaries if not result.error else total_bytes(report)
    return dataclasses.replace(result, seconds=seconds, largest=largest, temporaries=temporaries)


def refused(message: str) -> ConfigError:
    """Returns the error of a program that the compiler refuses, from its message."""
    line = message.splitlines()[0] if message else "no reason is given"
    return ConfigError(
        f"the compiler refuses the program of this mesh: {line}; choose another --mesh, or "
        "another exchange, such as --config.model.moe.transport=gather with "
        "--config.model.moe.exchange=all_to_all"
    )


def needed_memory(program: Compiled, held: int, hbm: int) -> dict[str, Any]:
    """Returns the bytes per device that a program needs, and whether they fit, as plain data.

    Args:
        program: The compiler's numbers.
        held: Bytes of the inputs that the device holds.
        hbm: Bytes of memory of the device; 0 if unknown.
    """
    peak = program.peak or held + program.temporaries
    limit = program.limit or hbm
    # The compiler rejects temporaries that exceed the memory, but does not add the state to them.
    fits = not program.error and (not limit or peak <= limit)
    return {
        "temporaries": program.temporaries,
        "peak": peak,
        "hbm": limit or None,
        "missing": max(peak - limit, 0) if limit and not fits else 0,
        "fits": fits,
    }


def _dumped(folder: str, name: str) -> str:
    """Returns a dump of the program; small programs of its tracing may have one too."""
    files = sorted(Path(folder).glob(f"*.{name}.txt"), key=lambda path: path.stat().st_size)
    return files[-1].read_text() if files else ""


def _fitting(compiled: jax.stages.Compiled) -> Compiled:
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None, "CPU and TPU report memory and text"
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes + outputs
    return Compiled(
        text=text,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        outputs=outputs,
        peak=max(memory.peak_memory_in_bytes, held),
    )


def out_of_memory(message: str, text: str = "") -> Compiled:
    """Returns the numbers in XLA's message that a program exceeds the memory.

    Args:
        message: The message, in one of two forms; the second form counts only temporaries.
        text: The program, if the compiler wrote it.
    """
    used, temporaries = _USED.search(message), _TEMPORARIES.search(message)
    match = used or temporaries
    sizes = match.groups() if match else ()
    return Compiled(
        text=text,
        temporaries=_size(*sizes[:2]) if temporaries else 0,
        peak=_size(*sizes[:2]) if used else 0,
        limit=_size(*sizes[2:]) if sizes else 0,
        error=message.strip(),
    )


def _size(number: str, unit: str) -> int:
    return round(float(number) * _UNITS[unit])


def total_bytes(report: str) -> int:
    """Returns the bytes of all temporaries in main memory from XLA's memory usage report."""
    found = re.search(r"Memory Space: default.*?\nTotal bytes: (\d+)", report)
    return int(found[1]) if found else 0


def largest_allocations(report: str, count: int = 3) -> tuple[Buffer, ...]:
    """Returns the largest buffers from XLA's memory usage report, which lists them by size.

    Values that are never needed at the same time share a buffer, which has the shape of the
    largest ones.
    """
    found = []
    for number, unit, shapes in _ROW.findall(report.partition("\nMemory Space: vmem")[0])[:count]:
        names = [re.sub(r"^\d+×", "", shape.strip()) for shape in shapes.split(", ")]
        names.sort(key=lambda name: -hlo.size(name))
        most = [name for name in names if hlo.size(name) == hlo.size(names[0])]
        found.append(Buffer(_size(number, unit), " or ".join(most)))
    return tuple(found)


def largest_values(text: str, count: int = 3) -> tuple[Buffer, ...]:
    """Returns the largest arrays that a compiled program computes, without padding of layouts.

    Arrays that share a buffer, such as the state of a loop before and after a step, have the same
    shape and operation, and are listed once. Values inside a fusion have no buffer.
    """
    program = hlo.parse(text)
    fused = set(re.findall(r" fusion\(.*?calls=%?([\w.\-]+)", text))
    found: set[Buffer] = set()
    for name, instructions in program.computations.items():
        if name in fused:
            continue
        for instruction in instructions:
            if instruction.operation in _NO_BUFFER:
                continue
            label = re.search(r'op_name="([^"]*)"', instruction.line)
            for array in hlo.arrays(instruction.type):
                operation = label[1] if label else instruction.operation
                found.add(Buffer(hlo.size(array), array, operation))
    shapes: dict[str, Buffer] = {}
    for buffer in sorted(found, key=lambda b: (-b.bytes, b.shape, len(b.operation), b.operation)):
        shapes.setdefault(buffer.shape, buffer)
    return tuple(shapes.values())[:count]
