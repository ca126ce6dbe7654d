"""A table of experts and gates by token id, from the routing of a corpus, and its agreement."""

from __future__ import annotations

import dataclasses
import zipfile
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from moe_jax import files
from moe_jax.analysis.observed import Observed, ObservedLayer
from moe_jax.errors import ConfigError
from moe_jax.models import Decoder, Model
from moe_jax.nn.router import RouterState
from moe_jax.routing.tabulated import EXPERTS, GATES, tabulated

# What NumPy raises for a file that is no archive of arrays, or a damaged one.
_UNREADABLE = (
    *(OSError, ValueError, KeyError, AttributeError, TypeError, EOFError),
    *(zipfile.BadZipFile, zlib.error),
)
Layer = tuple[Int[np.ndarray, "V K"], Float[np.ndarray, "V K"]]


@dataclasses.dataclass(frozen=True)
class RoutingTable:
    """The experts of common tokens.

    Attributes:
        layers: Experts ``(V, K)`` int32 and combine weights ``(V, K)`` float32 of every token id,
            for each MoE layer in order. A missing token has the experts -1.
    """

    layers: tuple[Layer, ...]

    @property
    def known(self) -> np.ndarray:
        """Mask ``(V,)`` of the token ids in the table, which are the same in all layers."""
        return self.layers[0][0][:, 0] >= 0

    def save(self, path: Path) -> None:
        """Writes the table as a file ``.npz``."""
        arrays: dict[str, np.ndarray] = {}
        for index, (experts, gates) in enumerate(self.layers):
            arrays |= {f"experts_{index}": experts, f"gates_{index}": gates}
        with files.replaced(path) as temporary, temporary.open("wb") as stream:
            np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path) -> RoutingTable:
        """Reads a table.

        Raises:
            ConfigError: If the file cannot be read or holds no table.
        """
        try:
            with np.load(path) as found:
                number = len(found.files) // 2
                layers = [(found[f"experts_{i}"], found[f"gates_{i}"]) for i in range(number)]
        except _UNREADABLE as error:
            raise ConfigError(
                f"{path} is no routing table: write one with moe-jax tabulate"
            ) from error
        return cls(tuple(layers))


def table_of(observed: Observed, vocab_size: int, least: int) -> RoutingTable:
    """Returns the table of the tokens that a corpus has often enough.

    An id gets the ``K`` experts that it chose most often in the layer, the lowest index first among
    equals. Its weights are the mean weights of these choices, scaled to the mean sum of the
    weights of the id. An expert that the id never chose has weight 0.

    Args:
        observed: Routing of the corpus.
        vocab_size: Number ``V`` of token ids.
        least: Smallest number of occurrences of an id in the table.
    """
    often = np.bincount(observed.tokens, minlength=vocab_size) >= least
    return RoutingTable(
        tuple(_layer(observed.tokens, layer, vocab_size, often) for layer in observed.layers)
    )


def _layer(ids: np.ndarray, layer: ObservedLayer, vocab_size: int, often: np.ndarray) -> Layer:
    k = layer.choices.shape[1]
    chosen, summed = np.zeros((2, vocab_size, layer.num_experts), np.float64)
    kept = np.zeros((vocab_size, layer.num_experts))
    made = layer.chosen
    place = np.broadcast_to(ids[:, None], layer.choices.shape)[made], layer.wanted[made]
    np.add.at(chosen, place, 1)
    # A dropped choice has no weight.
    np.add.at(summed, place, layer.gates[made])
    np.add.at(kept, place, layer.gates[made] > 0)
    experts = np.argsort(-chosen, axis=1, kind="stable")[:, :k].astype(np.int32)
    mean = np.take_along_axis(summed / np.maximum(kept, 1), experts, axis=1)
    tokens = np.maximum(np.bincount(ids, minlength=vocab_size), 1)[:, None]
    total = mean.sum(1, keepdims=True)
    gates = mean * (summed.sum(1, keepdims=True) / tokens) / np.where(total, total, 1)
    experts[~often], gates[~often] = -1, 0
    return experts, gates.astype(np.float32)


def install(model: Model, table: RoutingTable) -> None:
    """Makes the routers of a decoder read a table; lookahead modules keep their routers.

    Raises:
        ConfigError: If the model is no decoder, the table is of another model, or a router can read
            none.
    """
    if not isinstance(model, Decoder):
        raise ConfigError("a routing table is for the layers of a decoder: leave it out")
    vocabulary = model.embedding.table.shape[0]
    moes = [layer.moe for layer in model.config.sparse_layers()[: model.layers.num_sparse]]
    shapes = [(vocabulary, moe.router.select.choices(moe.num_experts)) for moe in moes]
    found = [experts.shape for experts, _ in table.layers]
    if shapes != found:
        raise ConfigError(
            f"the routing table has layers {found}, and the model needs {shapes}: write a table of "
            "this model with moe-jax tabulate"
        )
    if any(
        experts.max(initial=0) >= moe.num_experts
        for moe, (experts, _) in zip(moes, table.layers, strict=True)
    ):
        raise ConfigError("the routing table names experts that the model lacks: write a new one")
    for router, (experts, gates) in model.layers.with_routers(table.layers):
        router.router = tabulated(router.router)
        for name, array in ((EXPERTS, experts), (GATES, gates)):
            router.state[name] = RouterState(array, axes=("router", "router"))


def agreement(observed: Observed, table: RoutingTable) -> list[float | None]:
    """Returns for each layer the share of the choices of its router that the table has as well.

    Tokens outside of the table do not count; without any other, the share is ``None``.

    Args:
        observed: Routing without the table.
        table: The table.
    """
    covered = table.known[observed.tokens]
    shares: list[float | None] = []
    for layer, (experts, gates) in zip(observed.layers, table.layers, strict=True):
        wanted, ids = layer.wanted[covered], observed.tokens[covered]
        listed = np.where(gates > 0, experts, -1)[ids]
        same = (wanted[:, :, None] == listed[:, None, :]).any(2)[layer.chosen[covered]]
        shares.append(float(same.mean()) if same.size else None)
    return shares
