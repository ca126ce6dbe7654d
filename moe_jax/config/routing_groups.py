"""Groups of a teacher's experts, one for each expert of the student."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeAlias

from moe_jax.errors import ConfigError
from moe_jax.models import ModelConfig
from moe_jax.ranges import Range
from moe_jax.routing import NoHead

Group = Annotated[int, Range(-1, 2**20 - 1)]
RoutingGroups: TypeAlias = Sequence[Sequence[int]]


def check_routing(student: ModelConfig, teacher: ModelConfig, groups: RoutingGroups) -> None:
    """Rejects models whose routing distributions cannot be compared.

    Args:
        student: Model of the run.
        teacher: Model of its teacher.
        groups: Group of each expert of the teacher, by MoE layer; empty for equal numbers.

    Raises:
        ConfigError: If the models differ in their number of MoE layers, a layer has other numbers
            of experts or groups, experts choose tokens, or experts are in the attention.
    """
    ours, theirs = student.sparse_layers(), teacher.sparse_layers()
    if not ours or len(ours) != len(theirs) or (groups and len(groups) != len(ours)):
        raise ConfigError(
            f"training.routing_weight compares layer by layer, and this model has {len(ours)} MoE "
            f"layers, its teacher {len(theirs)} and training.routing_groups "
            f"{len(groups)}: use equal numbers, or unset training.routing_weight"
        )
    for index, (here, there) in enumerate(zip(ours, theirs, strict=True)):
        for router in (here.moe.router, there.moe.router):
            if here.in_attention or router.experts_choose or isinstance(router.head, NoHead):
                raise ConfigError(
                    f"the tokens of layer {here.name} have no shares of feed-forward experts by "
                    "which they choose: unset training.routing_weight"
                )
        logits, wanted = (one.moe.router.scored(one.moe.num_experts) for one in (here, there))
        group = groups[index] if groups else tuple(range(wanted))
        if len(group) != wanted or max(group, default=-1) + 1 != logits:
            raise ConfigError(
                f"layer {here.name} has {logits} logits and its teacher {wanted}, in "
                f"{max(group, default=-1) + 1} groups of {len(group)} experts: list the group of "
                "each expert of the teacher in training.routing_groups"
            )
