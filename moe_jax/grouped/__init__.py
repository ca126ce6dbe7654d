"""Grouped products: rows sorted by expert, each times the matrix of its expert.

This is the one product of a dropless layer. Its gradients are two more products of the same kind:
by the transposed matrices for the rows, and a sum of outer products for the matrices.
"""

from moe_jax.grouped.left import product_by_rows
from moe_jax.grouped.network import Choices, GateOn, LinearMaps, on_choices
from moe_jax.grouped.product import BACKENDS, Backend, backend_of, by_row, grouped_product, using
from moe_jax.grouped.separate import Blocks, on_separate, sum_of_found, with_expert

__all__ = [
    "BACKENDS",
    "Backend",
    "Blocks",
    "Choices",
    "GateOn",
    "LinearMaps",
    "backend_of",
    "by_row",
    "grouped_product",
    "on_choices",
    "on_separate",
    "product_by_rows",
    "sum_of_found",
    "using",
    "with_expert",
]
