"""Estimates the memory and collectives of a training step by formula, without a compiler."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import models
from moe_jax.config.experiment import Experiment
from moe_jax.models import EncoderDecoderConfig, ModelConfig
from moe_jax.models.config import SparseLayer
from moe_jax.models.stack import Remat
from moe_jax.nn.mode import TRAIN
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.parallel.mesh import AXES
from moe_jax.parallel.rules import RULES
from moe_jax.planning.collectives import Collective
from moe_jax.planning.compile import Step, batch_shapes
from moe_jax.transport import implementation

# Kinds of the collectives over the expert axis; see ``moe_jax.transport.Cost.sends``.
EXCHANGES = {
    "slots": "all-to-all",
    "choices": "ragged-all-to-all",
    "tokens": "collective-permute",
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """The slots of one MoE layer on one device in one microbatch.

    Attributes:
        moe: Configuration of the layer.
        tokens: Number of tokens that the device routes.
        slots: Number of slots of all experts for these tokens, filled or empty.
        choices: Largest number of these slots that hold a token.
        width: Mean of the widths of the experts' inputs and outputs.
        in_attention: True if the experts are projections of attention.
    """

    moe: MoEConfig
    tokens: int
    slots: int
    choices: int
    width: int
    in_attention: bool


def token_axes() -> tuple[str, ...]:
    """Returns the mesh axes that split the tokens of a batch."""
    axes = RULES["group"]
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def shards(sizes: dict[str, int]) -> int:
    """Returns the number of shards of the tokens on a mesh with these axis sizes."""
    return math.prod(sizes[axis] for axis in token_axes())


def moe_layers(experiment: Experiment, sizes: dict[str, int]) -> list[Layer]:
    """Returns the slots of every MoE layer on a device."""
    return [_layer(experiment, sizes, layer) for layer in experiment.model.sparse_layers()]


def _layer(experiment: Experiment, sizes: dict[str, int], layer: SparseLayer) -> Layer:
    data, moe = experiment.data, layer.moe
    length = data.seq_length if layer.of_inputs else data.target_length
    total = data.batch_size * length // experiment.training.microbatches
    group = min(moe.group_size, total)
    over = shards(sizes)
    groups = math.ceil(math.ceil(total / group) / over)
    capacity = moe.router.slots(group, moe.num_experts, train=True)
    slots = groups * capacity * moe.num_experts
    tokens, width = total // over, sum(layer.widths) // 2
    choices = math.ceil(tokens * moe.router.experts_per_token(group, moe.num_experts))
    return Layer(moe, tokens, slots, min(slots, choices), width, layer.in_attention)


def itemsize(experiment: Experiment) -> int:
    """Returns the bytes of one element of an activation."""
    return jnp.dtype(experiment.model.compute_dtype).itemsize


def recomputes(experiment: Experiment) -> bool:
    """Returns True if the backward pass recomputes the experts' forward pass.

    ``dots_no_batch`` keeps products with weights, but not the products of experts, because these
    have the expert as a batch axis.
    """
    return experiment.model.remat in ("full", "dots_no_batch")


def expected_collectives(experiment: Experiment, step: Step) -> list[Collective]:
    """Returns the collectives that a step needs; the compiler may add others.

    Every microbatch has these collectives:

    * All-to-alls send slots to their experts and back, or permutations send tokens and their sums
      around a ring, in the forward and the backward pass, and once more if the forward pass is
      recomputed.
    * All-gathers collect parameters split over ``fsdp`` in the type of activations, for the forward
      and the backward pass, and reduce-scatters sum their float32 gradients.
    * All-reduces sum gradients over the axes of the batch that do not split the parameter.
    * All-reduces over ``model`` sum the outputs of attention and of the feed-forward part of each
      layer in the forward pass, and the gradients of their inputs in the backward pass.
    """
    sizes = dict(step.mesh.shape)
    needed = [*_exchanges(experiment, sizes), *_gradients(experiment, step, sizes)]
    return [one for one in (*needed, *_partial_sums(experiment, sizes)) if one.devices > 1]


def _exchanges(experiment: Experiment, sizes: dict[str, int]) -> Iterator[Collective]:
    devices = sizes["expert"]
    passes = (6 if recomputes(experiment) else 4) * experiment.training.microbatches
    for layer in moe_layers(experiment, sizes):
        sends = implementation(layer.moe, devices).cost.sends
        size = layer.width * itemsize(experiment)
        if sends in ("slots", "choices"):
            sent, times = getattr(layer, sends) * size * (devices - 1) // devices, passes
        elif sends == "tokens":
            # A device sends all its tokens in every step of the ring.
            sent, times = layer.tokens * size, passes * devices
        else:
            continue
        what = f"{getattr(layer, sends)} {sends}"
        yield Collective(EXCHANGES[sends], ("expert",), devices, what, sent, times)


def _gradients(experiment: Experiment, step: Step, sizes: dict[str, int]) -> Iterator[Collective]:
    parts = experiment.training.microbatches
    for name, leaf in _named(step.state.params):
        split = _axes_of(leaf)
        local = math.prod(leaf.sharding.shard_shape(leaf.shape))
        gathered = tuple(a for a in sizes if a in split and a in token_axes() and a != "expert")
        if gathered:
            n = math.prod(sizes[axis] for axis in gathered)
            sent = local * (n - 1)
            size = itemsize(experiment)
            yield Collective("all-gather", gathered, n, name, sent * size, 2 * parts)
            yield Collective("reduce-scatter", gathered, n, name, sent * 4, parts)
        rest = tuple(a for a in sizes if a in token_axes() and a not in split and sizes[a] > 1)
        n = math.prod(sizes[axis] for axis in rest)
        yield Collective("all-reduce", rest, n, name, 2 * local * 4 * (n - 1) // n, parts)


def _partial_sums(experiment: Experiment, sizes: dict[str, int]) -> Iterator[Collective]:
    n = sizes["model"]
    size, wide = itemsize(experiment), experiment.model.width
    passes = 6 if experiment.model.remat == "full" else 4
    times = passes * experiment.training.microbatches
    ring = 2 * (n - 1)

    def summed(rows: int, width: int, what: str, times: int) -> Collective:
        return Collective("all-reduce", ("model",), n, what, rows * width * size * ring // n, times)

    routed = [layer for layer in moe_layers(experiment, sizes) if not layer.in_attention]
    for layer in routed:
        yield summed(layer.slots, layer.width, "experts", times // 2)
    for tokens, layers in stacks(experiment, sizes):
        yield summed(tokens, wide, "attention", times // 2 * layers)
        yield summed(tokens, wide, "dense", times // 2 * layers)


def stacks(experiment: Experiment, sizes: dict[str, int]) -> Iterator[tuple[int, int]]:
    """Yields the tokens per device and microbatch, and the number of layers, of each stack.

    Args:
        experiment: The experiment.
        sizes: Number of devices on each axis of the mesh.
    """
    data, over = experiment.data, shards(sizes) * experiment.training.microbatches
    model = experiment.model
    if isinstance(model, EncoderDecoderConfig):
        yield data.batch_size * data.seq_length // over, model.encoder_layers
        yield data.batch_size * data.target_length // over, model.decoder_layers
    else:
        yield data.batch_size * data.seq_length // over, model.num_layers + model.lookahead


def _named(params: Any) -> Iterator[tuple[str, jax.ShapeDtypeStruct]]:
    for path, leaf in nnx.to_flat_state(params):
        value = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
        yield ".".join(map(str, path)), value


def _axes_of(leaf: jax.ShapeDtypeStruct) -> set[str]:
    axes: set[str] = set()
    for part in leaf.sharding.spec:
        axes |= {part} if isinstance(part, str) else set(part or ())
    return axes


def gathered_bytes(experiment: Experiment, step: Step) -> int:
    """Returns the bytes of the gathered parameters of a device, in the type of activations."""
    sizes = dict(step.mesh.shape)
    total = 0
    for _, leaf in _named(step.state.params):
        split = [a for a in _axes_of(leaf) if a in token_axes() and a != "expert"]
        local = math.prod(leaf.sharding.shard_shape(leaf.shape))
        total += local * math.prod(sizes[axis] for axis in split)
    return total * itemsize(experiment)


def logits_bytes(experiment: Experiment, sizes: dict[str, int]) -> int:
    """Returns the bytes of the float32 logits in a device's memory at one time."""
    data = experiment.data
    length = data.target_length or data.seq_length
    chunk = experiment.training.loss_chunk or length
    rows = data.batch_size // experiment.training.microbatches
    return rows * chunk * experiment.vocab_size * 4 // (shards(sizes) * sizes["model"])


def kept_activations(experiment: Experiment, step: Step) -> int:
    """Returns the bytes that a device keeps between the forward and the backward pass.

    The number is traced: it is the size of the values that ``jax.vjp`` of the model saves for one
    microbatch, without parameters and under the configuration's rematerialisation, divided by the
    shards of the tokens. It excludes the logits, which ``logits_bytes`` counts.
    """
    return _kept(experiment, experiment.model.remat) // shards(dict(step.mesh.shape))


def working_set(experiment: Experiment, step: Step) -> int:
    """Returns the bytes of values that the backward pass of one layer recomputes.

    The number is the size of the values that the model keeps without rematerialisation, divided by
    its layers, and 0 if nothing is recomputed.
    """
    if experiment.model.remat == "none":
        return 0
    layers = sum(layers for _, layers in stacks(experiment, dict.fromkeys(AXES, 1)))
    return needed_activations(experiment, step) // layers


def needed_activations(experiment: Experiment, step: Step) -> int:
    """Returns the bytes per device of all values that the backward pass of a microbatch reads.

    The values count whether they are kept or recomputed.
    """
    return _kept(experiment, "none") // shards(dict(step.mesh.shape))


def _kept(experiment: Experiment, remat: Remat) -> int:
    data = experiment.data
    model = dataclasses.replace(experiment.model, remat=remat)
    rows = data.batch_size // experiment.training.microbatches
    return _saved_bytes(model, experiment.vocab_size, rows, data.seq_length, data.target_length)


@functools.lru_cache
def _saved_bytes(config: ModelConfig, vocab: int, rows: int, length: int, targets: int) -> int:
    """Returns the bytes on all devices of the values that the layers' backward pass reads."""
    model = jax.eval_shape(lambda: models.make(config, vocab, jax.random.key(0)))
    graph, params, *rest = nnx.split(model, nnx.Param, ...)

    def saved(params: Any, rest: Any, batch: Any) -> list[jax.Array]:
        def hidden(params: Any) -> Any:
            model = nnx.merge(graph, params, *rest)
            reading = model.read(batch, mode=TRAIN, rng=jax.random.key(0))
            return reading.hidden, reading.ahead, [aux.loss for aux in reading.reports]

        return jax.tree.leaves(jax.vjp(hidden, params)[1])

    batch = {
        name: jax.ShapeDtypeStruct(shape, jnp.int32)
        for name, shape in batch_shapes(config, rows, length, targets).items()
    }
    jaxpr = jax.make_jaxpr(saved)(params, rest, batch).jaxpr
    inputs = {id(var) for var in (*jaxpr.invars, *jaxpr.constvars)}
    avals = {id(var): var.aval for var in jaxpr.outvars if id(var) not in inputs}
    return sum(math.prod(aval.shape) * _itemsize(aval.dtype) for aval in avals.values())


def _itemsize(dtype: Any) -> int:
    """Returns the bytes of an element; a random key has two words of 4 bytes."""
    return getattr(dtype, "itemsize", 8)
