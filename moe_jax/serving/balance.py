"""An engine that moves copies of experts between devices by the loads that it measures."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from moe_jax.errors import ConfigError
from moe_jax.models import EncoderDecoder, Model
from moe_jax.serving.engine import Engine
from moe_jax.serving.placement import (
    copy_experts,
    device_loads,
    numbers_of_experts,
    place,
)
from moe_jax.serving.request import Token
from moe_jax.serving.resident import resident


class BalancedEngine(Engine):
    """An engine whose experts have further places, which follow the loads of the traffic.

    Each MoE layer has ``E + copies`` places on the devices of the expert axis. Between steps the
    experts are placed by the tokens that they have read since the last placement
    (``serving.place``). The arrays keep their shapes, so that nothing is compiled, and no request
    gets other tokens.

    Attributes:
        placements: Number of placements by measured loads.

    Examples:
        >>> import jax
        >>> import moe_jax.serving as serving
        >>> from moe_jax.models import Decoder, DecoderConfig
        >>> config = DecoderConfig(num_layers=2, width=16, num_heads=2, head_dim=8, mlp_dim=32)
        >>> model = Decoder(config, 64, jax.random.key(0))
        >>> engine = serving.BalancedEngine(model, 2, 256, 4, copies=4, every=8)
        >>> _ = engine.submit(serving.Request((1, 2, 3)))
        >>> _ = [engine.step() for _ in range(8)]
        >>> engine.placements
        1
    """

    def __init__(
        self,
        model: Model,
        slots: int = 16,
        length: int = 2048,
        prefill: int = 64,
        *,
        copies: int,
        every: int = 0,
        mesh: Mesh | None = None,
        **sizes: Any,
    ):
        """Gives the experts their first places, and compiles as ``Engine`` does.

        Args:
            model: Decoder in which tokens choose experts; it stays as it is.
            slots: Largest number of requests that run at once.
            length: Largest number of tokens of a request, with its sample.
            prefill: Largest number of tokens of a prompt that a step reads.
            copies: Number of further places of each MoE layer.
            every: Number of steps between placements; 0 for those of ``balance`` alone.
            mesh: Mesh of devices.
            **sizes: Further arguments of ``Engine``.

        Raises:
            ConfigError: If a number is negative, places do not divide into the devices, the model
                has no experts that can have copies, or ``Engine`` rejects an argument.
        """
        if copies < 0 or every < 0:
            raise ConfigError(f"copies={copies} and every={every} must be at least 0")
        if sizes.get("offload") is not None:
            raise ConfigError(
                "copies need all experts on the devices: leave the copies or the budget out"
            )
        if isinstance(model, EncoderDecoder):
            raise ConfigError("copies of experts serve decoders: use decoding.translate")
        equal = [np.ones(number) for number in numbers_of_experts(model)]
        if not equal:
            raise ConfigError("the model has no experts to place: serve it without copies")
        self._devices = 1 if mesh is None else mesh.shape["expert"]
        self._copies, self._every = copies, every
        self._steps = self.placements = 0
        self._source: Any = jax.tree.map(lambda leaf: leaf, model)
        self._move(equal)
        # The second placement moves places to places, as all later ones do.
        self._move(equal)
        super().__init__(self._source, slots, length, prefill, mesh=mesh, **sizes)
        self._counted = [0 * ones for ones in equal]

    @property
    def recent_load(self) -> list[Float[np.ndarray, " E"]]:
        """Number ``(E,)`` of tokens of each expert since the last placement, for each MoE layer."""
        return [
            now - before
            for now, before in zip(self.load or self._counted, self._counted, strict=True)
        ]

    @property
    def device_loads(self) -> list[Float[np.ndarray, " devices"]]:
        """Tokens of each device since the last placement, for each MoE layer."""
        return [
            device_loads(load, places, self._devices)
            for load, places in zip(self.recent_load, self._places, strict=True)
        ]

    def step(self) -> list[Token]:
        """Computes one step, and places the experts after each ``every`` of them."""
        tokens = super().step()
        self._steps += 1
        if self._every and self._steps % self._every == 0:
            self.balance()
        return tokens

    def balance(self) -> None:
        """Places the experts by their loads since the last placement; without any, they stay."""
        recent = self.recent_load
        if not any(load.any() for load in recent):
            return
        self._move(recent)
        with self._on_mesh():
            self._model = resident(self._source)
        self._leaves = jax.tree.leaves(self._model)
        self._counted = [np.asarray(load) for load in self.load]
        self.placements += 1

    def _move(self, loads: list[Float[np.ndarray, " E"]]) -> None:
        self._places = [place(load, len(load) + self._copies, self._devices) for load in loads]
        copy_experts(self._source, self._places)
