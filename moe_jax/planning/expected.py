"""What a training step holds and sends, by formula: for machines that nothing is compiled for."""

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

# The collectives by which rows cross the expert axis; see ``moe_jax.transport.Cost.sends``.
EXCHANGES = {"slots": "all-to-all", "tokens": "collective-permute"}


@dataclasses.dataclass(frozen=True)
class Layer:
    """The slots of one MoE layer on one device in one microbatch.

    Attributes:
        moe: the layer.
        tokens: that the device routes.
        slots: of all experts together that hold them, filled or not.
        width: mean of the features that go to the experts and come back.
        in_attention: whether the experts project for attention.
    """

    moe: MoEConfig
    tokens: int
    slots: int
    width: int
    in_attention: bool


def token_axes() -> tuple[str, ...]:
    """Returns the mesh axes that split the tokens of a batch."""
    axes = RULES["group"]
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def shards(sizes: dict[str, int]) -> int:
    """Returns over how many shards the tokens are split on a mesh of these sizes."""
    return math.prod(sizes[axis] for axis in token_axes())


def moe_layers(experiment: Experiment, sizes: dict[str, int]) -> list[Layer]:
    """Returns every MoE layer with its slots on a device."""
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
    return Layer(moe, total // over, slots, sum(layer.widths) // 2, layer.in_attention)


def itemsize(experiment: Experiment) -> int:
    """Returns the bytes of one activation."""
    return jnp.dtype(experiment.model.compute_dtype).itemsize


def recomputes(experiment: Experiment) -> bool:
    """Whether the backward pass runs the experts' forward pass again.

    ``dots_no_batch`` keeps products with weights, but the experts' have a batch axis, the expert.
    """
    return experiment.model.remat in ("full", "dots_no_batch")


def expected_collectives(experiment: Experiment, step: Step) -> list[Collective]:
    """Returns what the step has to send; the compiler may send more, never these less.

    * Slots go to their experts and back, or tokens and their sums go round a ring: forward,
      backward, and again where the forward pass is recomputed.
    * Parameters that ``fsdp`` splits are gathered in the type of activations, for the forward and
      for the backward pass, and their float32 gradients are reduced and scattered.
    * The gradients of what the batch's axes do not split are reduced over these.
    * What ``model`` splits is summed: the output of attention and of the feed-forward part of each
      layer in the forward pass, and their inputs' gradients in the backward pass.

    All of it once per microbatch.
    """
    sizes = dict(step.mesh.shape)
    found = [*_exchanges(experiment, sizes), *_gradients(experiment, step, sizes)]
    return [one for one in (*found, *_partial_sums(experiment, sizes)) if one.devices > 1]


def _exchanges(experiment: Experiment, sizes: dict[str, int]) -> Iterator[Collective]:
    devices = sizes["expert"]
    passes = (6 if recomputes(experiment) else 4) * experiment.training.microbatches
    for layer in moe_layers(experiment, sizes):
        sends = implementation(layer.moe).cost.sends
        size = layer.width * itemsize(experiment)
        if sends == "slots":
            sent, times = layer.slots * size * (devices - 1) // devices, passes
        elif sends == "tokens":
            # In every step of the ring a device sends all its tokens.
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
    width = experiment.model.width * itemsize(experiment)
    passes = 6 if experiment.model.remat == "full" else 4
    times = passes * experiment.training.microbatches
    ring = 2 * (n - 1)

    def summed(rows: int, what: str, times: int) -> Collective:
        return Collective("all-reduce", ("model",), n, what, rows * width * ring // n, times)

    routed = [layer for layer in moe_layers(experiment, sizes) if not layer.in_attention]
    for layer in routed:
        yield summed(layer.slots, "experts", times // 2)
    for tokens, layers in _stacks(experiment, sizes):
        yield summed(tokens, "attention", times // 2 * layers)
        yield summed(tokens, "dense", times // 2 * layers)


def _stacks(experiment: Experiment, sizes: dict[str, int]) -> Iterator[tuple[int, int]]:
    """Tokens on a device in a microbatch, and layers, of each stack."""
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
    found: set[str] = set()
    for part in leaf.sharding.spec:
        found |= {part} if isinstance(part, str) else set(part or ())
    return found


def gathered_bytes(experiment: Experiment, step: Step) -> int:
    """Returns the bytes of all parameters that a device computes with, in activations' type."""
    sizes = dict(step.mesh.shape)
    total = 0
    for _, leaf in _named(step.state.params):
        split = [a for a in _axes_of(leaf) if a in token_axes() and a != "expert"]
        local = math.prod(leaf.sharding.shard_shape(leaf.shape))
        total += local * math.prod(sizes[axis] for axis in split)
    return total * itemsize(experiment)


def logits_bytes(experiment: Experiment, sizes: dict[str, int]) -> int:
    """Returns the bytes of the float32 logits that a device holds at once."""
    data = experiment.data
    length = data.target_length or data.seq_length
    chunk = experiment.training.loss_chunk or length
    rows = data.batch_size // experiment.training.microbatches
    return rows * chunk * experiment.vocab_size * 4 // (shards(sizes) * sizes["model"])


def kept_activations(experiment: Experiment, step: Step) -> int:
    """Returns the bytes that a device keeps between the forward and the backward pass.

    Traced, not estimated: what ``jax.vjp`` of the model saves beside the parameters, under the
    configuration's rematerialisation, for one microbatch, evenly over the shards of the tokens.
    The head, whose logits ``logits_bytes`` counts, is not in it.
    """
    return _kept(experiment, experiment.model.remat) // shards(dict(step.mesh.shape))


def working_set(experiment: Experiment, step: Step) -> int:
    """Returns the bytes that the backward pass of one layer holds while it recomputes the layer.

    What the model would keep without rematerialisation, shared evenly among its layers; 0 if
    nothing is recomputed.
    """
    if experiment.model.remat == "none":
        return 0
    layers = sum(layers for _, layers in _stacks(experiment, dict.fromkeys(AXES, 1)))
    return needed_activations(experiment, step) // layers


def needed_activations(experiment: Experiment, step: Step) -> int:
    """Returns the bytes of a device's share of all values that the backward pass reads.

    Of one microbatch, whether they are kept for it or computed again.
    """
    return _kept(experiment, "none") // shards(dict(step.mesh.shape))


def _kept(experiment: Experiment, remat: Remat) -> int:
    data = experiment.data
    model = dataclasses.replace(experiment.model, remat=remat)
    rows = data.batch_size // experiment.training.microbatches
    return _saved_bytes(model, experiment.vocab_size, rows, data.seq_length, data.target_length)


@functools.lru_cache
def _saved_bytes(config: ModelConfig, vocab: int, rows: int, length: int, targets: int) -> int:
    """Bytes on all devices together of what the backward pass of the layers needs."""
    model = jax.eval_shape(lambda: models.make(config, vocab, jax.random.key(0)))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def saved(params: Any, rest: Any, batch: Any) -> list[jax.Array]:
        def hidden(params: Any) -> Any:
            model = nnx.merge(graph, params, rest)
            reading = model.read(batch, mode=TRAIN, rng=jax.random.key(0))
            return reading.hidden, reading.ahead, [aux.loss for aux in reading.reports]

        return jax.tree.leaves(jax.vjp(hidden, params)[1])

    batch = {
        name: jax.ShapeDtypeStruct(shape, jnp.int32)
        for name, shape in batch_shapes(config, rows, length, targets).items()
    }
    jaxpr = jax.make_jaxpr(saved)(params, rest, batch).jaxpr
    given = {id(var) for var in (*jaxpr.invars, *jaxpr.constvars)}
    kept = {id(var): var.aval for var in jaxpr.outvars if id(var) not in given}
    return sum(math.prod(aval.shape) * _itemsize(aval.dtype) for aval in kept.values())


def _itemsize(dtype: Any) -> int:
    """Bytes of an element; a random key has two words."""
    return getattr(dtype, "itemsize", 8)
