"""The networks of all experts on sorted choices: tokens in, sums of weighted outputs out.

The forward pass keeps the tokens, the pre-activations and the indices. The backward pass computes
the rows of the choices, the hidden layer and the outputs again. The memory of activations therefore
does not grow with the number of choices per token at a fixed width of all chosen experts together.
The gates scale the hidden layer instead of the outputs: their gradient then needs no output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.ad_checkpoint
from jaxtyping import Array, Float, Int

from moe_jax.grouped import fused
from moe_jax.grouped.moves import by_choice, gathered, spread
from moe_jax.grouped.product import by_row, chosen_backend, grouped_product

GateOn = Literal["in", "out", "none"]
_KEPT = "pre_activations"


@runtime_checkable
class LinearMaps(Protocol):
    """The linear maps of an expert's parameters, or of every row's expert."""

    def __call__(self, x: Array, name: str, gate: Array | None = None) -> Array:
        """Returns ``gate`` times the map ``name`` of the rows ``x``, its bias included."""


@runtime_checkable
class Network(Protocol):
    """A network in two stages, as hashable settings; a stage is a function of linear maps."""

    def before(self, linear: LinearMaps, x: Array) -> Any:
        """Returns the pre-activations of the rows ``x (R, M)``: a tree of arrays ``(R, ...)``."""

    def after(self, linear: LinearMaps, pre: Any, gate: Array | None) -> Array:
        """Returns the outputs ``(R, N)`` times ``gate (R, 1)``."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choices:
    """The choices of ``T`` tokens in the order of their experts.

    Attributes:
        token: Token ``(R,)`` of each row, ``T`` for a row without a choice.
        weight: Gate ``(R,)`` of each row.
        place: Row ``(T, K)`` of each choice, ``R`` for a choice without a row.
        sizes: Number ``(E,)`` of rows of each expert; the rows after their sum have no choice.
    """

    token: Int[Array, " R"]
    weight: Float[Array, " R"]
    place: Int[Array, "T K"]
    sizes: Int[Array, " E"]


def on_choices(
    network: Network,
    parameters: Mapping[str, Float[Array, "E ..."]],
    tokens: Float[Array, "T M"],
    gate: Float[Array, "T K"],
    choices: Choices,
    gate_on: GateOn = "out",
) -> Float[Array, "T N"]:
    """Returns for each token the sum of its experts' outputs.

    Args:
        network: The two stages of an expert.
        parameters: Parameters of all experts by name, in the type of the tokens; the map ``name``
            has the matrices ``name (E, ., .)`` and, if there are any, the biases ``name_bias
            (E, .)``.
        tokens: Tokens ``(T, M)``.
        gate: Gates ``(T, K)``; ``choices.weight`` has the same numbers by row.
        choices: The choices in the order of their experts.
        gate_on: Gates scale the ``in``puts, the ``out``puts, or nothing.
    """
    gate = gate.astype(tokens.dtype)
    choices = dataclasses.replace(choices, weight=choices.weight.astype(tokens.dtype))
    name = chosen_backend()
    if name == "loop":
        index = (choices.token, choices.weight, choices.place, choices.sizes)
        return fused.on_choices(network, gate_on, dict(parameters), tokens, gate, index)
    return _composed(network, gate_on, name, dict(parameters), tokens, gate, choices)


def _composed(
    network: Network,
    gate_on: GateOn,
    backend: str,
    parameters: dict[str, Array],
    tokens: Array,
    gate: Array,
    choices: Choices,
) -> Array:
    sizes, rows = choices.sizes, choices.token.shape[0]

    def run(parameters: dict[str, Array], tokens: Array, gate: Array) -> Array:
        def linear(x: Array, name: str, gate: Array | None = None) -> Array:
            x = x if gate is None else x * gate
            y = grouped_product(x, parameters[name], sizes, backend)
            if f"{name}_bias" not in parameters:
                return y
            bias = by_row(parameters[f"{name}_bias"], sizes, rows)
            return y + (bias if gate is None else bias * gate)

        with jax.named_scope("dispatch"):
            x = spread(tokens, choices.token, choices.place)
            weight = by_choice(choices.weight, gate, choices.place)[:, None]
            x = x * weight if gate_on == "in" else x
        with jax.named_scope("experts"):
            pre = jax.ad_checkpoint.checkpoint_name(network.before(linear, x), _KEPT)
            outputs = network.after(linear, pre, weight if gate_on == "out" else None)
        with jax.named_scope("combine"):
            return gathered(outputs, choices.token, choices.place)

    policy = jax.checkpoint_policies.save_only_these_names(_KEPT)
    return jax.checkpoint(run, policy=policy)(parameters, tokens, gate)
