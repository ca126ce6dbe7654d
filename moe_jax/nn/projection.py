"""Projections between features among the parameters, by the names of their axes."""

from __future__ import annotations

from collections.abc import Sequence

from flax import nnx

# Embeddings, heads and routers have other axes.
_PROJECTED = {"embed", "heads", "head", "mlp", "latent", "latent_embed"}
_PROJECTED |= {"expert", "expert_mlp", "expert_embed"}
_WIDTHS = ("embed", "expert_embed")


def is_projection(param: nnx.Variable, *further: str) -> bool:
    """Returns True for a matrix between features, or a stack of one matrix per expert.

    Args:
        param: Parameter.
        *further: Names of axes that a projection may have too, such as ``router``.
    """
    metadata = param.get_metadata()
    axes = without_experts(metadata["axes"])
    return (
        metadata.get("decayed", True)
        and len(axes) > 1
        and _PROJECTED.union(further).issuperset(axes)
    )


def without_experts(axes: Sequence[str | None]) -> list[str | None]:
    """Returns the names of the axes of one expert's matrix."""
    return [name for name in axes if name != "expert"]


def number_of_inputs(axes: Sequence[str | None]) -> int:
    """Returns the number of input axes of a projection, which stand before its output axes.

    Args:
        axes: Names of the axes of one matrix.
    """
    # An output projection sums over several axes, such as heads and features of a head.
    return len(axes) - 1 if axes[-1] in _WIDTHS else 1
