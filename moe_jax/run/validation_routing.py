"""Measures the routing of a trained model on the validation set."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from moe_jax import processes
from moe_jax.analysis.domains import DomainTable
from moe_jax.analysis.tokens import TokenExpertTable
from moe_jax.data import best_possible_loss
from moe_jax.nn.mode import Mode
from moe_jax.run.session import Session
from moe_jax.training.state import TrainState

_TABLE_BATCHES = 8
_TABLE_TOKENS = 12


@dataclasses.dataclass(frozen=True)
class RoutedLayer:
    """The valid tokens of a batch in one MoE layer.

    Attributes:
        tokens: Token ids ``(N,)``.
        experts: Bool mask ``(N, E)``, True where an expert processes a token.
        domains: Domain ``(N,)`` of each token's document; ``None`` for an encoder-decoder, because
            the domains of its encoder's tokens are unknown.
    """

    tokens: np.ndarray
    experts: np.ndarray
    domains: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class ValidationRouting:
    """Routing of the validation set at one training state; the step is compiled once."""

    session: Session
    state: TrainState

    def __iter__(self) -> Iterator[list[RoutedLayer]]:
        """Yields the MoE layers of each batch."""
        session, state = self.session, self.state
        spans = session.experiment.data.spans
        for batch in session.eval_batches():
            found = self._step(state.params, state.router_state, session.place(batch))
            tokens, experts, domains = processes.fetch(found)
            yield [
                RoutedLayer(ids[valid], taken[valid], domains[valid] if spans is None else None)
                for (ids, valid), taken in zip(tokens, experts, strict=True)
            ]

    @functools.cached_property
    def _step(self) -> Any:
        graph = self.session.graph

        def routed(params: nnx.State, router_state: nnx.State, batch: dict[str, jax.Array]):
            model = nnx.merge(graph, params, router_state)
            reading = model.read(batch, mode=Mode("eval", record=True))
            experts = [report.experts for report in reading.reports]
            return model.routed(batch), experts, batch["domains"]

        return jax.jit(routed, out_shardings=self.session.everywhere)


def expert_tokens(routing: ValidationRouting) -> dict[str, Any]:
    """Returns the most frequent tokens of each expert of each MoE layer on validation batches."""
    session = routing.session
    layers = session.experiment.model.sparse_layers()
    if not layers:
        return {"layers": []}
    tokenizer = session.tokenizer
    num_experts = max(layer.moe.num_experts for layer in layers)
    table = TokenExpertTable(len(layers), num_experts, tokenizer.vocab_size)
    for _, batch in zip(range(_TABLE_BATCHES), routing, strict=False):
        for index, found in enumerate(batch):
            absent = num_experts - found.experts.shape[1]  # of a layer with fewer experts
            table.add(index, found.tokens, np.pad(found.experts, ((0, 0), (0, absent))))
    return {
        "layers": [
            {
                "layer": layer.name,
                "experts": [
                    [
                        {"piece": tokenizer.piece(t.token), "count": t.count, "share": t.share}
                        for t in expert
                    ]
                    for expert in top[: layer.moe.num_experts]
                ],
            }
            for layer, top in zip(layers, table.top_tokens(_TABLE_TOKENS), strict=True)
        ]
    }


def against_truth(routing: ValidationRouting) -> dict[str, Any]:
    """Returns the best possible loss, and how well experts separate the domains of the text.

    Only the source ``mixture`` without span corruption has a known loss and known domains; other
    sources give an empty dict. A token counts for each expert that processes it in evaluation,
    under the domain of its document.
    """
    session = routing.session
    experiment = session.experiment
    config = experiment.data
    if config.source != "mixture" or config.eval_source or config.spans is not None:
        return {}
    layers = experiment.model.sparse_layers()
    domains = config.mixture.num_languages
    most = max((layer.moe.num_experts for layer in layers), default=0)
    table = DomainTable(len(layers), most, domains, session.tokenizer.vocab_size)
    for batch in routing if layers else ():
        for index, layer in enumerate(batch):
            assert layer.domains is not None  # The text is whole: it has no spans.
            if index == 0:
                table.add_tokens(layer.tokens, layer.domains)
            table.add(index, layer.domains, layer.experts)
    scores = [
        {"layer": layer.name, **table.layer(index, layer.moe.num_experts)}
        for index, layer in enumerate(layers)
    ]
    known = {"domains": domains, "token_information": table.token_information, "layers": scores}
    # The loss of masked tokens, with text on both sides, has another bound.
    best = None if config.mask_rate else best_possible_loss(config, session.tokenizer)
    return {
        **({} if best is None else {"best_possible_loss": best}),
        **({"specialisation": known} if layers else {}),
    }
