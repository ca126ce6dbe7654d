"""Attention of queries to keys under a mask that is held as structure."""

from moe_jax.attend.attend import attend
from moe_jax.attend.choice import IMPLEMENTATIONS, Choice, Needs, check, choose, summary
from moe_jax.attend.options import Kernel, Options
from moe_jax.attend.paged import PagedView
from moe_jax.attend.view import View

__all__ = [
    "IMPLEMENTATIONS",
    "Choice",
    "Kernel",
    "Needs",
    "Options",
    "PagedView",
    "View",
    "attend",
    "check",
    "choose",
    "summary",
]
