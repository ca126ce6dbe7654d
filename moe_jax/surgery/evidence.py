"""Measures the load, gates and outputs of each expert on a stream, and the loss without it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from moe_jax import models, routing
from moe_jax.errors import ConfigError
from moe_jax.nn.feed_forward import Experts, MixedExperts
from moe_jax.nn.groups import into_groups, out_of_groups, tokens_into_groups
from moe_jax.nn.mode import DECODE, Mode
from moe_jax.nn.moe import ConfiguredMoE, MoEAux
from moe_jax.routing.head import Head
from moe_jax.surgery.factors import factors
from moe_jax.surgery.mixture import (
    LayerName,
    MixtureLayer,
    feed_forward_layers,
    mixtures,
    with_mixtures,
)
from moe_jax.surgery.silent import NEVER, SILENT, Silent
from moe_jax.surgery.weights import LayerWeights
from moe_jax.training.loss import score_tokens
from moe_jax.training.step import predicted_tokens

Batch = Mapping[str, Any]
_PREFIX = "surgery_"


@dataclasses.dataclass(frozen=True)
class Use:
    """Statistics of the experts of a layer on a stream, with a slot for every choice.

    Attributes:
        load: Number ``(E,)`` of tokens that each expert processes.
        gate: Sum ``(E,)`` of the gates of these tokens.
        output: Sum ``(E,)`` over these tokens of the norm of what the expert adds to the output of
            the layer: the gate times the expert's output, or the output for gated inputs.
        logits: Sums ``(E, E)`` over all tokens of products of the logits of two experts.
        tokens: Number ``()`` of tokens that the layer reads.
        mix: Sums ``(2,)`` over all tokens of the factors of the routed and of the shared output;
            see ``moe_jax.surgery.factors``. Without shared experts every factor is 1.
    """

    load: Float[np.ndarray, " E"]
    gate: Float[np.ndarray, " E"]
    output: Float[np.ndarray, " E"]
    logits: Float[np.ndarray, "E E"]
    tokens: Float[np.ndarray, ""]
    mix: Float[np.ndarray, " P"]

    def score(self, by: str) -> Float[np.ndarray, " E"]:
        """Returns the score ``(E,)`` of each expert; the expert of lowest score matters least.

        Args:
            by: ``load``, the share of the choices; ``gate``, the share of the sum of all gates;
                ``output``, the mean of gate times norm of the output over the tokens of an expert
                (REAP, 2510.13999, equation 9).
        """
        if by == "output":
            return self.output / np.maximum(self.load, 1)
        values = {"load": self.load, "gate": self.gate}[by]
        return values / max(values.sum(), np.finfo(np.float64).tiny)


@dataclasses.dataclass(frozen=True)
class Routed:
    """The tokens of one batch that the experts of a layer process, with a slot for every choice.

    Attributes:
        inputs: Tokens ``(E, T, M)`` of the experts, 0 in an empty slot.
        weight: Combine weight ``(E, T)`` of each slot, 0 in an empty slot.
        filled: Mask ``(E, T)``, True where the slot holds a token.
        logits: Logits ``(G, S, E)`` of all tokens, 0 for padding.
        load: Number ``(E,)`` of tokens of each expert.
        tokens: Number of tokens that are no padding.
        mix: Sums ``(2,)`` over these tokens of the factors of the routed and the shared output.
    """

    inputs: Float[Array, "E T M"]
    weight: Float[Array, "E T"]
    filled: Bool[Array, "E T"]
    logits: Float[Array, "G S E"]
    load: Float[Array, " E"]
    tokens: Float[Array, ""]
    mix: Float[Array, " P"]


class Observing(ConfiguredMoE):
    """An MoE layer whose report also has what ``observed`` measures."""

    def __call__(
        self,
        x: Array,
        valid: Array,
        *,
        mode: Mode,
        rng: Array | None = None,
        token_ids: Array | None = None,
        record: Array | None = None,
        carried: Array | None = None,
        residual: Array | None = None,
    ) -> tuple[Array, MoEAux]:
        """Returns the output of the layer and its report, with the measured sums."""
        more = {"token_ids": token_ids, "record": record, "carried": carried}
        y, report = super().__call__(x, valid, mode=mode, rng=rng, residual=residual, **more)
        tokens = self.groups_of(x, DECODE)
        size, routed_by = tokens.shape[1], self.router_input(tokens, residual)
        held = into_groups(valid, size, False)
        given = None if carried is None else tokens_into_groups(carried, size)
        logits = self.router.logits(routed_by, given)
        plan, _ = self.plan(routed_by, valid, mode=DECODE, **more)
        inputs = self.latent.project(tokens) if self.config.latent_dim else tokens
        mix = self._mix(x, valid, tokens, plan, residual)
        observed = self.observed(self._routed(plan, inputs, logits, held, mix))
        observed = {_PREFIX + name: value for name, value in observed.items()}
        counts = dataclasses.replace(report.counts, observed=report.counts.observed | observed)
        return y, dataclasses.replace(report, counts=counts)

    def _mix(
        self, x: Array, valid: Array, tokens: Array, plan: routing.Plan, residual: Array | None
    ) -> Float[Array, " P"]:
        """Returns the sums over the tokens of the factors of the routed and the shared output."""
        if not self.config.shared.hidden:
            return jnp.full(2, valid.sum(), jnp.float32)
        y = self.mixed(tokens, *self.dispatched(plan))
        found = factors(self.shared, x, out_of_groups(y, x.shape), residual)
        return jnp.where(valid[..., None], found, 0).sum((0, 1))

    def _routed(
        self, plan: routing.Plan, tokens: Array, logits: Array, held: Array, mix: Array
    ) -> Routed:
        slots = plan.slots
        assert isinstance(slots, routing.Slots)  # ``check_measurable`` refuses soft slots.
        # A router without ``mask_padding`` gives slots to padding, which is no evidence.
        padding = jnp.broadcast_to(~held[..., None], (*held.shape, slots.token.shape[-2]))
        slots = slots.without(padding)
        rows = jax.vmap(lambda x, index: jnp.take(x, index, axis=0, mode="fill", fill_value=0))
        inputs = rows(tokens, slots.token)

        def of_experts(array: Array, *width: int) -> Array:
            return jnp.moveaxis(array, 1, 0).reshape(inputs.shape[1], -1, *width)

        first = logits[..., 0] if self.router.router.planes > 1 else logits
        return Routed(
            of_experts(inputs, inputs.shape[-1]),
            of_experts(slots.weight),
            of_experts(slots.filled),
            jnp.where(held[..., None], first[..., : inputs.shape[1]], 0),
            slots.filled.sum((0, 2)).astype(jnp.float32),
            held.sum().astype(jnp.float32),
            mix,
        )

    def applied(self, routed: Routed) -> tuple[Float[Array, "E T M"], Float[Array, "E T"]]:
        """Returns what the experts read and the factor of each output, as gates are applied."""
        if self.config.router.gate_on == "in":
            weight = routed.weight[..., None].astype(routed.inputs.dtype)
            return routed.inputs * weight, routed.filled.astype(jnp.float32)
        return routed.inputs, routed.weight

    def observed(self, routed: Routed) -> dict[str, Array]:
        """Returns sums over the tokens of a batch, by name."""
        raise NotImplementedError


class _Using(Observing):
    """Measures the fields of ``Use``."""

    def observed(self, routed: Routed) -> dict[str, Array]:
        inputs, factor = self.applied(routed)
        outputs = self.experts(inputs)
        norms = jnp.linalg.norm(outputs.astype(jnp.float32), axis=-1)
        return {
            "load": routed.load,
            "gate": routed.weight.sum(-1),
            "output": (factor * norms).sum(-1),
            "logits": jnp.einsum("gse,gsf->ef", routed.logits, routed.logits),
            "tokens": routed.tokens,
            "mix": routed.mix,
        }


def check_measurable(weights: LayerWeights) -> None:
    """Rejects models whose experts take mixtures of tokens, so that no token belongs to one.

    Raises:
        ConfigError: If a layer has soft slots.
    """
    for layer in feed_forward_layers(weights):
        if isinstance(layer.moe.router.select, routing.SoftSlots):
            raise ConfigError(
                f"the experts of layer {layer.name} take mixtures of all tokens (SoftSlots): no "
                "token is an expert's own, so its use cannot be measured"
            )


def check_loads(weights: LayerWeights, instead: str) -> None:
    """Rejects models whose experts choose tokens, so that no load tells one from another.

    Args:
        weights: The model.
        instead: What to do instead, for the message.

    Raises:
        ConfigError: If experts of a layer choose tokens.
    """
    for layer in feed_forward_layers(weights):
        if layer.moe.router.experts_choose:
            raise ConfigError(
                f"the experts of layer {layer.name} choose tokens: all of them have the same load, "
                f"and fewer experts would choose more tokens each: {instead}"
            )


def use_of(weights: LayerWeights, batches: Iterable[Batch]) -> dict[LayerName, Use]:
    """Returns the statistics of the experts of each layer on a stream.

    Args:
        weights: The model.
        batches: Batches of ``moe_jax.data``.

    Raises:
        ConfigError: See ``check_measurable``, and if there is no batch.
    """
    return {name: Use(**sums) for name, sums in observe(weights, _Using, batches).items()}


def observe(
    weights: LayerWeights,
    layer: type[Observing],
    batches: Iterable[Batch],
    prepare: Callable[[models.Model], None] = lambda model: None,
) -> dict[LayerName, dict[str, np.ndarray]]:
    """Returns for each layer the sums over a stream of what ``layer.observed`` measures.

    Args:
        weights: The model.
        layer: Class of an MoE layer, which every MoE layer of the model becomes.
        batches: Batches of ``moe_jax.data``.
        prepare: Function that adds modules to the model.

    Raises:
        ConfigError: See ``check_measurable``, and if there is no batch.
    """
    check_measurable(weights)
    model = weights.module()
    prepare(model)
    for _, module in nnx.iter_modules(model):
        if type(module) is ConfiguredMoE and isinstance(module.experts, Experts | MixedExperts):
            module.__class__ = layer
    graph, state = nnx.split(model)
    names = [layer.name for layer in feed_forward_layers(weights)]
    sums = _total(_sums(graph, state, batch) for batch in batches)
    return dict(zip(names, sums, strict=True))


def _added(one: Any, other: Any) -> Any:
    return other if one is None else jax.tree.map(np.add, one, other)


def _total(parts: Iterable[Any]) -> Any:
    """Returns the sum of trees of arrays, in float64.

    Raises:
        ConfigError: If there is none.
    """
    wide = (jax.tree.map(lambda x: np.asarray(x, np.float64), part) for part in parts)
    total = functools.reduce(_added, wide, None)
    if total is None:
        raise ConfigError("the stream has no batch: give a longer text")
    return total


@functools.partial(jax.jit, static_argnums=0)
def _sums(graph: nnx.GraphDef, state: nnx.State, batch: Batch) -> list[dict[str, Array]]:
    model = nnx.merge(graph, state)
    observed = [report.counts.observed for report in model.read(batch, mode=Mode("full")).reports]
    kept = [
        {name.removeprefix(_PREFIX): of[name] for name in of if name.startswith(_PREFIX)}
        for of in observed
    ]
    return [sums for sums in kept if sums]


def loss_of(weights: LayerWeights, batches: Iterable[Batch]) -> float:
    """Returns the mean negative log-likelihood of a stream in nats; no expert drops a token.

    Raises:
        ConfigError: If the stream has no batch.
    """
    graph, state = nnx.split(weights.module())
    nll, tokens = _total(_nll(graph, state, batch) for batch in batches)
    return float(nll / max(tokens, 1))


@functools.partial(jax.jit, static_argnums=0)
def _nll(graph: nnx.GraphDef, state: nnx.State, batch: Batch) -> Array:
    model: models.Model = nnx.merge(graph, state)
    hidden = model.read(batch, mode=DECODE).hidden
    scored = score_tokens(model.embedding, hidden, batch["targets"], chunk=0)
    valid = predicted_tokens(batch)
    return jnp.stack([(scored.nll * valid).sum(), valid.sum().astype(jnp.float32)])


@dataclasses.dataclass(frozen=True)
class LeaveOneOut:
    """Removes experts one by one; each step removes the expert whose removal costs least.

    An expert is left out by its logit (``Silent``), so that all models have one shape and compile
    once.

    Attributes:
        weights: The model.
        batches: Batches of the stream, which is read once per candidate.
    """

    weights: LayerWeights
    batches: tuple[Batch, ...]

    def without(self, removed: Mapping[LayerName, frozenset[int]]) -> float:
        """Returns the loss of the model without some experts."""
        changed = {
            name: _silenced(mixture, removed.get(name, frozenset()))
            for name, mixture in mixtures(self.weights).items()
        }
        return loss_of(with_mixtures(self.weights, changed), self.batches)

    def greedy(
        self, experts: int, least: Mapping[LayerName, int], *, across: bool = False
    ) -> dict[LayerName, list[int]]:
        """Returns the experts that stay.

        Args:
            experts: Number of experts that a layer keeps; the mean over layers if ``across``.
            least: Number of experts that each layer keeps in any case.
            across: True removes the next expert of any layer; False reduces each layer in turn.
        """
        sizes = {name: m.num_experts for name, m in mixtures(self.weights).items()}
        removed: dict[LayerName, frozenset[int]] = {name: frozenset() for name in sizes}
        goal = experts * len(sizes)
        pools = [list(sizes)] if across else [[name] for name in sizes]
        for pool in pools:
            floor = {name: least[name] if across else experts for name in pool}
            while _left(sizes, removed, pool) > (goal if across else experts):
                removed = self._step(removed, floor)
        return {n: [e for e in range(size) if e not in removed[n]] for n, size in sizes.items()}

    def _step(
        self, removed: Mapping[LayerName, frozenset[int]], floor: Mapping[LayerName, int]
    ) -> dict[LayerName, frozenset[int]]:
        """Returns ``removed`` with the expert whose removal costs least."""
        found = mixtures(self.weights)
        candidates = [
            {**removed, name: removed[name] | {expert}}
            for name, fewest in floor.items()
            for expert in _spare(found[name], removed[name], fewest)
        ]
        if not candidates:
            raise ConfigError("the routers need all remaining experts: keep more")
        return min(candidates, key=self.without)


def _spare(mixture: MixtureLayer, removed: frozenset[int], fewest: int) -> list[int]:
    """Returns the experts of a layer that may be left out next; groups of neighbours stay equal."""
    groups = mixture.neighbour_groups
    here = np.arange(mixture.num_experts).reshape(groups, -1)
    left = [[e for e in group.tolist() if e not in removed] for group in here]
    return [e for group in left if len(group) * groups > fewest for e in group]


def _left(
    sizes: Mapping[LayerName, int],
    removed: Mapping[LayerName, frozenset[int]],
    pool: Iterable[LayerName],
) -> int:
    return sum(sizes[name] - len(removed[name]) for name in pool)


def _silenced(mixture: MixtureLayer, removed: frozenset[int]) -> MixtureLayer:
    """Returns the layer with logits that let no token choose the removed experts."""
    router = mixture.moe.router
    index = np.asarray(sorted(removed), np.int32)
    scored = mixture.num_experts + router.free.count
    arrays = {**mixture.router, SILENT: jnp.zeros(scored).at[index].set(NEVER)}
    state = dict(mixture.state)
    if "bias" in state:
        state["bias"] = jnp.asarray(state["bias"]).at[index].set(NEVER)
    head = cast(Head, Silent(router.head))
    silent = mixture.with_settings(router=dataclasses.replace(router, head=head))
    return dataclasses.replace(silent, router=arrays, state=state)
