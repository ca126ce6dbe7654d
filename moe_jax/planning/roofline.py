"""How fast a step can be: published peaks against what it computes, moves and sends.

A bound, not a forecast: every product runs at the chip's peak, memory is read and written at its
full bandwidth, wires are never shared by two collectives. A run is slower; how much slower is the
quality of kernels and scheduling that the bound leaves out.

The rule of overlap is stated and simple. The exchange of slots over ``expert`` (all-to-alls, or the
permutations of its ring) and the sums of tensor parallelism over ``model`` stand in the way of the
next operation and are exposed whole. Gathers of parameters and reductions of gradients, which XLA
also writes as permutations beside parts of a product, are exposed by what exceeds the computation:

    step = max(compute, memory, beside) + in the way

(https://jax-ml.github.io/scaling-book/roofline).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

from moe_jax.config.experiment import Experiment
from moe_jax.counting.count import count
from moe_jax.planning import expected
from moe_jax.planning.collectives import Collective
from moe_jax.planning.compile import Step
from moe_jax.planning.links import Wires
from moe_jax.transport import implementation


@dataclasses.dataclass(frozen=True)
class Work:
    """Floating-point operations of one step on all devices together.

    Attributes:
        model: forward and backward of what the model needs: unmasked scores, filled slots. The
            numerator of MFU.
        padding: slots of experts beyond the choices of tokens, and scores that are masked.
        transport: dispatch and combine, of transports that are matrix products.
        recomputed: the forward pass again, by rematerialisation and by ``loss_chunk``.
    """

    model: float
    padding: float
    transport: float
    recomputed: float

    @property
    def hardware(self) -> float:
        """All that devices compute."""
        return self.model + self.padding + self.transport + self.recomputed


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one step, by what bounds it.

    Attributes:
        compute: all FLOPs at peak.
        memory: all bytes of memory at full bandwidth.
        beside: collectives that may run beside the computation.
        in_the_way: collectives that may not.
        tokens: of one step.
        mfu: model FLOPs per second over the peak of all chips.
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
        """Tokens per second, padding included."""
        return self.tokens / self.step

    @property
    def bound(self) -> str:
        """What takes longest."""
        sides = {
            "compute": self.compute,
            "memory": self.memory,
            "parameters and gradients on the wire": self.beside,
            "exchange on the wire": self.in_the_way,
        }
        return max(sides, key=lambda name: sides[name])


@functools.lru_cache
def work(experiment: Experiment) -> Work:
    """Counts the FLOPs of a step; the optimizer's few per parameter are left out.

    The backward pass is twice the forward pass. ``full`` rematerialisation computes all layers
    again, ``dots_no_batch`` what has a batch axis: experts, transport and attention scores.
    """
    sequence = experiment.sequence
    costs = {
        kind: count(experiment.model, experiment.vocab_size, sequence, kind)
        for kind in ("exact", "full", "computed")
    }
    tokens = experiment.tokens_per_step
    exact, computed = costs["exact"], costs["computed"]
    parts = computed.flops_by_part
    model = exact.training_flops_per_token * tokens
    padding = (computed.training_flops_per_token - exact.training_flops_per_token) * tokens
    transport = _transport(experiment)
    masked = costs["full"].flops_per_token - exact.flops_per_token
    again = 0.0
    if experiment.model.remat == "full":
        layers = sum(flops for part, flops in parts.items() if part != "head")
        again = (layers + computed.lookahead_flops) * tokens + transport
    elif experiment.model.remat == "dots_no_batch":
        # Of causal attention, half of the scores is masked.
        again = (parts["experts"] + 2 * masked) * tokens + transport
    if experiment.training.loss_chunk:
        again += parts["head"] * tokens
    return Work(model, padding, 3 * transport, again)


def _transport(experiment: Experiment) -> float:
    """FLOPs of dispatch and combine, forward: each multiplies ``(S, E C)`` with ``(S, M)``."""
    data, total = experiment.data, 0.0
    for layer in experiment.model.sparse_layers():
        moe = layer.moe
        if implementation(moe).cost.products:
            slots = moe.router.slots(moe.group_size, moe.num_experts, train=True)
            length = data.seq_length if layer.of_inputs else data.target_length
            each = 2 * moe.num_experts * slots * sum(layer.widths)
            total += each * data.batch_size * length
    return total


def memory_bytes(experiment: Experiment, step: Step) -> int:
    """Returns the bytes that a device reads and writes in a step.

    Per microbatch: gathered parameters in the type of activations for the forward and backward
    pass and the recomputed one, local gradients added up, every value that the backward pass needs
    written and read once, and logits written and read forward and backward. Once: parameters and
    statistics updated. All else is taken to stay on the chip.
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
    experiment: Experiment, step: Step, sent: Iterable[Collective], wires: Wires
) -> Roofline:
    """Returns the bound on a step.

    Args:
        experiment: what runs.
        step: the step.
        sent: its collectives, from the compiled program or by formula.
        wires: the machine under the mesh.
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
        compute=done.hardware / (topology.num_chips * chip.flops),
        memory=memory_bytes(experiment, step) / chip.device_bandwidth,
        beside=beside,
        in_the_way=in_the_way,
        tokens=experiment.tokens_per_step,
        mfu=0.0,
    )
    mfu = done.model / (found.step * topology.num_chips * chip.flops)
    return dataclasses.replace(found, mfu=mfu)


def record(found: Roofline) -> dict[str, Any]:
    """Returns plain data; ``step_seconds`` is a lower and ``mfu`` an upper bound."""
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
