"""Evaluates a run with a routing table in place of the choices of its routers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from moe_jax.analysis.routing_table import RoutingTable, install
from moe_jax.run import workdir
from moe_jax.run.session import Session
from moe_jax.run.tabulating import require_tabulable
from moe_jax.training.state import TrainState, split_model

# Measures of an evaluation that a table changes; only models of texts have bits per byte.
_MEASURES = ("loss", "bits_per_byte", "accuracy")


def open_table(path: str, folder: Path) -> RoutingTable:
    """Reads the routing table for a run.

    Args:
        path: File of ``moe-jax tabulate``.
        folder: Workdir of the run.

    Raises:
        ConfigError: If the folder holds no run, a router of the run can read no table, or the file
            holds none.
    """
    require_tabulable(workdir.load(folder).model)
    return RoutingTable.load(path)


def evaluated_with(
    table: RoutingTable, session: Session, state: TrainState, before: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the measures of the validation set with a table, on the mesh of the session.

    The capacities are those of the evaluation without the table.

    Args:
        table: Experts of common tokens.
        session: Session of the run.
        state: State of the run, whose routers stay as they are.
        before: Means of ``session.evaluate(state)``.

    Returns:
        Loss, bits per byte and accuracy with the table, the increase of the loss, and the number
        of token ids in the table.

    Raises:
        ConfigError: If the table is of another model.
    """
    model = nnx.merge(session.graph, state.params, state.router_state)
    install(model, table)
    graph, params, router_state = split_model(model)
    reading = dataclasses.replace(session, graph=graph)
    after = reading.evaluate(dataclasses.replace(state, params=params, router_state=router_state))
    return {
        **{name: after[name] for name in _MEASURES if name in after},
        "loss_increase": after["loss"] - before["loss"],
        "table_ids": int(table.known.sum()),
    }
