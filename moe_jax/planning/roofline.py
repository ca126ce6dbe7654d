"""Computes a lower bound on the time of a step from published peaks of the chip.

The bound is not a forecast: it assumes that every product runs at the peak of the chip, that memory
has its full bandwidth, and that two collectives never share a link. A run is slower, because
kernels and scheduling are not perfect.

The rule of overlap is simple. The exchange of slots over ``expert`` (all-to-alls, or the
permutations of a ring) and the sums of tensor parallelism over ``model`` block the next operation,
so that their full time counts. Gathers of parameters and reductions of gradients, which XLA also
writes as permutations, overlap with computation, so that only the excess counts:

    step = max(compute, memory, beside) + in_the_way

(https://jax-ml.github.io/scaling-book/roofline).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

from moe_jax.config.experiment import Experiment
from moe_jax.counting.count import Cost, count
from moe_jax.planning import expected
from moe_jax.planning.collectives import Collective
from moe_jax.planning.compile import Step
from moe_jax.planning.links import Wires
from moe_jax.transport import implementation


@dataclasses.dataclass(frozen=True)
class Work:
    """Floating-point operations of one step on all devices together.

    Attributes:
        model: FLOPs of the forward and backward pass for unmasked scores and filled slots, which
            are the numerator of MFU.
        slots: FLOPs of empty slots.
        masked: FLOPs of masked scores, if nothing skips them.
        transport: FLOPs of dispatch and combine in transports that use matrix products.
        recomputed: FLOPs of the forward pass that rematerialisation and ``loss_chunk`` repeat,
            without masked scores and transport.
        scores: FLOPs of the forward pass for unmasked scores and their sums of values, once.
    """

    model: float
    slots: float
    masked: float
    transport: float
    recomputed: float
    scores: float

    @property
    def needed(self) -> float:
        """FLOPs of the model, of the slots of its capacity, and of rematerialisation."""
        return self.model + self.slots + self.recomputed

    @property
    def hardware(self) -> float:
        """FLOPs of all computations of the devices."""
        return self.needed + self.masked + self.transport


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Lower bounds on the seconds of one step.

    Attributes:
        compute: Seconds of all FLOPs at the peak of the chips.
        memory: Seconds of all bytes read and written at full bandwidth.
        beside: Seconds of the collectives that overlap with computation.
        in_the_way: Seconds of the collectives that block computation.
        tokens: Tokens per step.
        mfu: FLOPs of the model per second, relative to the peak of all chips.
    """

    compute: float
    memory: float
    beside: float
    in_the_way: float
    tokens: int
    mfu: float

    @property
    def step(self) -> float:
        """Seconds of the whole step."""
        return max(self.compute, self.memory, self.beside) + self.in_the_way

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second, with padding."""
        return self.tokens / self.step

    @property
    def bound(self) -> str:
        """Name of the resource that takes longest."""
        sides = {
            "compute": self.compute,
            "memory": self.memory,
            "parameters and gradients on the wire": self.beside,
            "exchange on the wire": self.in_the_way,
        }
        return max(sides, key=lambda name: sides[name])


@functools.lru_cache
def work(experiment: Experiment) -> Work:
    """Returns the FLOPs of a step without the optimizer's, which are few per parameter.

    The backward pass has twice the FLOPs of the forward pass. Rematerialisation ``full`` recomputes
    all layers, ``dots_no_batch`` the products with a batch axis: experts, transport and attention
    scores. A compiled program may skip masked scores; ``compiled_flops`` counts what it does.
    """
    sequence = experiment.sequence
    costs = {
        kind: count(experiment.model, experiment.vocab_size, sequence, kind)
        for kind in ("exact", "full", "computed")
    }
    tokens = experiment.tokens_per_step
    exact, computed = costs["exact"], costs["computed"]
    parts = computed.flops_by_part
    transport, remat = _transport(experiment), experiment.model.remat
    masked = _forward(costs["full"]) - _forward(exact)
    slots = _forward(computed) - _forward(costs["full"])
    again = 0.0
    if remat == "full":
        again = _forward(computed) - masked - parts["head"]
    elif remat == "dots_no_batch":
        # Of causal attention, half of the scores is masked.
        again = parts["experts"] + masked
    if experiment.training.loss_chunk:
        again += parts["head"]
    # Dispatch, combine and masked scores run again with the rest.
    passes = 4 if remat in ("full", "dots_no_batch") else 3
    return Work(
        model=3 * _forward(exact) * tokens,
        slots=3 * slots * tokens,
        masked=passes * masked * tokens,
        transport=passes * transport,
        recomputed=again * tokens,
        scores=exact.score_flops * tokens,
    )


def _forward(cost: Cost) -> int:
    return cost.flops_per_token + cost.lookahead_flops


def _transport(experiment: Experiment) -> float:
    """Returns the forward FLOPs of dispatch and combine: ``(S, E C)`` times ``(S, M)`` each."""
    data, total = experiment.data, 0.0
    for layer in experiment.model.sparse_layers():
        moe = layer.moe
        if implementation(moe, experiment.mesh.expert).cost.products:
            slots = moe.router.slots(moe.group_size, moe.num_experts, train=True)
            length = data.seq_length if layer.of_inputs else data.target_length
            each = 2 * moe.num_experts * slots * sum(layer.widths)
            total += each * data.batch_size * length
    return total


def memory_bytes(experiment: Experiment, step: Step) -> int:
    """Returns the bytes that a device reads and writes in a step.

    Each microbatch reads gathered parameters in the type of activations in every pass, accumulates
    local gradients, writes and reads every value that the backward pass needs, and writes and reads
    logits in the forward and the backward pass. Each step updates parameters and statistics once.
    All other values are assumed to stay on the chip.
    """
    state, training = step.bytes, experiment.training
    passes = 3 if expected.recomputes(experiment) else 2
    each = (
        passes * expected.gathered_bytes(experiment, step)
        + 2 * state.parameters
        + 2 * expected.needed_activations(experiment, step)
        + 4 * expected.logits_bytes(experiment, dict(step.mesh.shape)) * _chunks(experiment)
    )
    return each * training.microbatches + 2 * (state.parameters + state.optimizer)


def _chunks(experiment: Experiment) -> int:
    chunk = experiment.training.loss_chunk
    scored = experiment.data.target_length or experiment.data.seq_length
    return scored // chunk if chunk and scored % chunk == 0 else 1


def roofline(
    experiment: Experiment,
    step: Step,
    sent: Iterable[Collective],
    wires: Wires,
    flops: float | None = None,
) -> Roofline:
    """Returns the bounds on the time of a step.

    Args:
        experiment: The experiment.
        step: The training step.
        sent: Collectives of the step, from the compiled program or by formula.
        wires: Positions of the mesh's devices in the machine.
        flops: FLOPs of the compiled step on all devices; ``None`` takes them from ``work``.
    """
    topology = wires.topology
    chip, done = topology.chip, work(experiment)
    beside = in_the_way = 0.0
    for one in sent:
        exchanged = "expert" in one.axes and one.kind in expected.EXCHANGES.values()
        if exchanged or "model" in one.axes:
            in_the_way += wires.seconds(one)
        else:
            beside += wires.seconds(one)
    found = Roofline(
        compute=(flops or done.hardware) / (topology.num_chips * chip.flops),
        memory=memory_bytes(experiment, step) / chip.device_bandwidth,
        beside=beside,
        in_the_way=in_the_way,
        tokens=experiment.tokens_per_step,
        mfu=0.0,
    )
    mfu = done.model / (found.step * topology.num_chips * chip.flops)
    return dataclasses.replace(found, mfu=mfu)


def record(found: Roofline) -> dict[str, Any]:
    """Returns the bounds as plain data; ``step_seconds`` is a lower, ``mfu`` an upper bound."""
    return {
        "compute_seconds": found.compute,
        "memory_seconds": found.memory,
        "beside_seconds": found.beside,
        "in_the_way_seconds": found.in_the_way,
        "step_seconds": found.step,
        "tokens_per_second": found.tokens_per_second,
        "mfu": found.mfu,
        "bound": found.bound,
    }
