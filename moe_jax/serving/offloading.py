"""A budget of bytes for the experts on the device, and the steps of an engine within it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax.numpy as jnp

from moe_jax.errors import ConfigError
from moe_jax.models import Decoder, Model
from moe_jax.models.stack import StackCache
from moe_jax.offload import (
    ExpertCache,
    HostStore,
    LeastStale,
    NextRouter,
    OffloadCounts,
    Policy,
    Predictor,
    Store,
    arrays_of,
)
from moe_jax.serving.layered import Host, LayeredStep
from moe_jax.serving.program import StepShape, compiled
from moe_jax.serving.resident import resident
from moe_jax.serving.rows import by_rows
from moe_jax.serving.without_experts import without_experts

# A function of the leaves of a model, the pages and the inputs of a step.
Step = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Offload:
    """The way to keep few experts on the device, and the others in a store.

    Attributes:
        bytes: Largest number of bytes of experts on the device. A draft model and lookahead modules
            that draft have all of theirs there, beside the budget.
        policy: Chooses the experts that leave the device.
        predictor: Foresees the experts of the next layer, which load meanwhile.
        store: All experts; ``None`` copies those of the model into the memory of the host.

    Examples:
        >>> from moe_jax.serving import Offload
        >>> Offload(bytes=2 * 10**9).bytes
        2000000000
    """

    bytes: int
    policy: Policy = LeastStale()
    predictor: Predictor = NextRouter()
    store: Store | None = None


class WholeSteps:
    """Steps that are one program each, with all experts on the device.

    Attributes:
        model: The model of the steps.
        counts: ``None``: no expert moves.
    """

    counts: OffloadCounts | None = None

    def __init__(self, model: Decoder):
        """Prepares the model for the steps."""
        self.model = resident(model)

    def compiled(
        self,
        layers: StackCache,
        shapes: Sequence[StepShape],
        top: int,
        also: Collection[str] = (),
    ) -> dict[StepShape, Step]:
        """Returns the steps of some shapes; see ``moe_jax.serving.program.step``."""
        return compiled(self.model, layers, shapes, top, also)


class LayeredSteps:
    """Steps that take the experts of each layer from a cache.

    Attributes:
        model: The model of the steps, without experts.
    """

    def __init__(self, model: Decoder, offload: Offload):
        """Brings the experts into a store, and leaves them out of the model.

        Raises:
            ConfigError: If the host cannot apply the experts of the model, or an expert is larger
                than the budget.
        """
        self.model = by_rows(without_experts(model))
        dtype = jnp.dtype(model.config.compute_dtype)
        store = offload.store or HostStore(arrays_of(model, dtype))
        own = experts_per_layer(model)
        if store.experts != own and offload.store is None:
            raise ConfigError(
                f"the MoE layers of the model have {store.experts} places for {own} experts: give "
                "the engine the model before copy_experts, or leave the budget out"
            )
        if store.experts != own:
            raise ConfigError(
                f"the store has {store.experts} experts per MoE layer, and the model has {own}: "
                "write the experts of this model"
            )
        cache = ExpertCache(store, offload.bytes, offload.policy)
        self._host = Host(store, cache, offload.predictor)

    @property
    def counts(self) -> OffloadCounts:
        """Counts of the experts that layers asked for."""
        return self._host.cache.counts

    def compiled(
        self,
        layers: StackCache,
        shapes: Sequence[StepShape],
        top: int,
        also: Collection[str] = (),
    ) -> dict[StepShape, Step]:
        """Returns the steps of some shapes; see ``moe_jax.serving.program.step``."""
        return {
            shape: LayeredStep(self.model, layers, shape, top, self._host, also) for shape in shapes
        }


Steps = WholeSteps | LayeredSteps


def steps_of(model: Decoder, offload: Offload | None) -> Steps:
    """Returns the steps of a model with all experts on the device, or within a budget."""
    return WholeSteps(model) if offload is None else LayeredSteps(model, offload)


def experts_per_layer(model: Model) -> tuple[int, ...]:
    """Returns the number of experts of each MoE layer of a decoder; none for other models."""
    if not isinstance(model, Decoder):
        return ()
    layers = [view.block.config.mixtures for view in model.layers.layers()]
    return tuple(moe.num_experts for mixtures in layers for moe in mixtures)
