"""Checks a lower bound of a run's memory against the devices, before compilation."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.config.experiment import Experiment
from moe_jax.counting import count
from moe_jax.errors import ConfigError
from moe_jax.models import DecoderConfig
from moe_jax.parallel import make_mesh
from moe_jax.training.optimizer import optimizer_of
from moe_jax.training.state import Recipe, TrainState, named_leaves

# Bytes per parameter: parameter, two moments and gradient in float32.
_MOST_PER_PARAMETER = 16


def check_memory(experiment: Experiment, vocab_size: int) -> None:
    """Rejects a run whose state, gradients and activations cannot fit into a device's memory.

    Raises:
        ConfigError: If the lower bound exceeds the device's memory; the message names both numbers
            and the settings to change.
    """
    available = memory_of_device()
    activations = activation_bytes(experiment, vocab_size)
    if available is None:
        return
    total = count(experiment.model, vocab_size, experiment.sequence)
    if _MOST_PER_PARAMETER * (total.total + total.lookahead) + activations < available:
        return
    state = abstract_state(experiment, vocab_size)
    needed = needed_bytes(state, activations, experiment.frozen_leaves)
    if needed > available:
        raise ConfigError(
            f"a device needs at least {needed:,} bytes for parameters, optimizer, gradients and "
            f"activations, and has {available:,}: use more devices with mesh.fsdp, mesh.expert or "
            "mesh.model, a smaller data.batch_size or more training.microbatches, "
            "training.loss_chunk, model.remat=full, model.compute_dtype=bfloat16 or "
            "optimizer.rule.type=Adafactor"
        )


def memory_of_device() -> int | None:
    """Returns the memory of one device in bytes; CPU devices share the host's memory."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return pages // jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit")


def abstract_state(experiment: Experiment, vocab_size: int) -> TrainState:
    """Returns the state of a run as shapes with shardings, without allocating it."""
    optimizer = optimizer_of(experiment)
    seed, mesh = experiment.training.seed, make_mesh(experiment.mesh)
    return Recipe(experiment.model, vocab_size, optimizer, seed, mesh).abstract()[1]


def needed_bytes(state: TrainState, activations: int, frozen: Collection[str] = frozenset()) -> int:
    """Returns a lower bound of the peak memory of a step on one device, in bytes.

    Args:
        state: Shapes with shardings.
        activations: Bytes of the forward activations. They and the complete gradients do not exist
            at the same time, so the larger of both counts.
        frozen: Names of leaves that have no gradient.
    """
    leaves = named_leaves({"params": state.params})
    gradient = [leaf for name, leaf in leaves.items() if name not in frozen]
    return _held(state) + max(_held(gradient), activations)


def activation_bytes(experiment: Experiment, vocab_size: int) -> int:
    """Returns the bytes of all layer inputs and of the logits of one microbatch on a device."""
    mesh = experiment.mesh.resolve(jax.device_count())
    training, model, config = experiment.training, experiment.model, experiment.data
    rows = config.batch_size // (mesh.data * mesh.fsdp * mesh.expert * training.microbatches)
    # The mesh may shard any dimension over these axes.
    split = mesh.sequence * mesh.model
    width = jnp.dtype(model.compute_dtype).itemsize
    layers = model.num_layers if isinstance(model, DecoderConfig) else model.encoder_layers
    inputs = rows * config.seq_length * model.width * layers * width
    scored = config.target_length or config.seq_length
    logits = rows * min(training.loss_chunk or scored, scored) * vocab_size * width
    return (inputs + logits // mesh.fsdp) // split


def _held(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
