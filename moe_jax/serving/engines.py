"""The engine of an opened model."""

from __future__ import annotations

import dataclasses
from typing import Any

from moe_jax.models import Decoder, Model
from moe_jax.run.opened import FolderModel
from moe_jax.serving.balance import BalancedEngine
from moe_jax.serving.engine import Engine
from moe_jax.serving.offloading import Offload
from moe_jax.serving.request import Generator
from moe_jax.serving.speculation import Speculation
from moe_jax.serving.stream import TrafficRules
from moe_jax.serving.traffic import Traffic, layers_of


@dataclasses.dataclass(frozen=True)
class Room:
    """Room for requests.

    Attributes:
        slots: Number of requests that run at once.
        queue: Number of requests that may wait beside them.
        context: Largest number of tokens of prompt and answer together.
        copies: Number of further places for experts in each MoE layer.
        place_every: Number of steps between placements of experts; without copies, of no effect.
        speculation: The way to draft tokens; ``None`` drafts none.
        offload: A budget for the experts on the device; ``None`` keeps all of them there.
        rules: Alarms on the tokens that the engine reads; ``None`` for none, and of no effect on a
            model without experts.
    """

    slots: int = 8
    queue: int = 64
    context: int = 1024
    copies: int = 0
    place_every: int = 1000
    speculation: Speculation | None = None
    offload: Offload | None = None
    rules: TrafficRules | None = None


def engine_of(opened: FolderModel, room: Room) -> Generator:
    """Returns the engine of a model with ``room.slots`` slots of ``room.context`` tokens.

    Raises:
        ConfigError: If the model does not fit the room.
    """
    sizes: dict[str, Any] = {
        "mesh": opened.mesh,
        "speculation": room.speculation,
        "offload": room.offload,
        "traffic": _traffic(opened.model, room.rules),
    }
    if not room.copies:
        return Engine(opened.model, room.slots, room.context, **sizes)
    sizes |= {"copies": room.copies, "every": room.place_every}
    return BalancedEngine(opened.model, room.slots, room.context, **sizes)


def _traffic(model: Model, rules: TrafficRules | None) -> Traffic | None:
    """Returns the alarms of a model with experts, if there are rules."""
    if rules is None or not isinstance(model, Decoder) or not (layers := layers_of(model)):
        return None
    return Traffic(rules, layers)
