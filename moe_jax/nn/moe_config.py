"""Configuration of mixture-of-experts layers: their indices, experts, router and transport."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable
from typing import Literal, Protocol, runtime_checkable

from moe_jax import routing
from moe_jax.errors import ConfigError
from moe_jax.nn.feed_forward import FeedForwardConfig
from moe_jax.nn.shared import SharedConfig
from moe_jax.ranges import Chance, Experts, Growth, LayerIndex, Natural, Positive, Ranged
from moe_jax.transport import ExchangeName, TransportName
from moe_jax.transport import check as check_transport


@dataclasses.dataclass(frozen=True)
class LayerOverride(Ranged):
    """Settings of some MoE layers, which replace the settings of ``moe`` in these layers.

    Attributes:
        layers: Indices, from 0, of the layers.
        router: Router of these layers; ``None`` keeps the router of ``moe``.
        num_experts: Number ``E`` of experts in these layers; 0 keeps the number of ``moe``.
        expert_dim: Hidden width ``F`` of the experts in these layers; 0 keeps the width of ``moe``.
    """

    layers: tuple[LayerIndex, ...]
    router: routing.Router | None = None
    num_experts: Natural = 0
    expert_dim: Natural = 0

    def applied(self, config: MoEConfig) -> MoEConfig:
        """Returns ``config`` with the settings that this override replaces."""
        changed = {
            name: getattr(self, name)
            for name in ("router", "num_experts", "expert_dim")
            if getattr(self, name)
        }
        return dataclasses.replace(config, **changed)


@dataclasses.dataclass(frozen=True)
class MoEConfig(Ranged):
    """Mixture-of-experts (MoE) layers: their indices, experts, router and transport.

    Attributes:
        every: Period of MoE layers: 2 makes the layers 1, 3, ... (counted from 0) MoE layers, 1
            all layers, and 0 none.
        last: Number of MoE layers among the layers that ``every`` selects, counted from the last
            layer (V-MoE's last-n); 0 selects all of them.
        layers: Indices, from 0, of the MoE layers, instead of ``every`` and ``last``.
        overrides: Settings of MoE layers whose router or experts differ.
        num_experts: Number ``E`` of experts per layer.
        expert_dim: Hidden width ``F`` of each expert.
        expert_dims: Hidden widths for experts of several sizes, instead of ``expert_dim``; an equal
            number of consecutive experts has each width.
        latent_dim: Width ``R`` of the experts' inputs and outputs (LatentMoE, 2601.18089): one
            projection of all tokens to this width precedes the experts, and one projection back to
            the model width follows them. The router and the shared experts read the model width.
            0 makes the experts as wide as the model, without projections.
        gated: True makes experts gated linear units; ``None`` makes them like the dense layers.
        group_size: Number ``S`` of tokens per group; the capacity of an expert is per group. A
            batch that does not divide into groups is padded. With full capacity, experts that
            choose tokens have a row of the batch as their group.
        router: The router.
        transport: Movement of tokens within a device: ``einsum`` multiplies by dispatch tensors,
            ``gather`` indexes by the slot table, ``ragged`` sorts the choices by expert and
            computes them by grouped products (for dropless routing), and ``auto`` selects one of
            them for the router and the mesh.
        exchange: Movement of tokens to the devices of their experts and back: ``gspmd`` lets XLA
            partition a transpose of the slots, ``all_to_all`` is the same exchange in
            ``shard_map``, ``ring`` passes tokens from device to device, and ``ragged`` sends each
            choice to the device of its expert (both for dropless routing).
            ``transport="auto"`` replaces ``gspmd`` by ``ragged`` where that suits.
        exchange_buffer: Rows that a device can receive with ``exchange="ragged"``, relative to an
            even share of the choices; choices beyond them are dropped and counted as dropped.
            ``None`` gives every choice a row.
        shared: Shared experts, which process every token.
        extra_dense: Position of a further dense sub-layer, ``before`` or ``after`` the experts
            (sparse-dense stacking, ST-MoE 2202.08906, appendix C).
        expert_dropout: Dropout rate of the experts' output in training (Switch, section 2.4).
        expert_mask: Probability in training that a token loses the whole output of an expert; at
            test time the outputs are multiplied by ``1 - expert_mask`` (NLLB's ``moe_eom``).
        final_mask: Probability in training that a token loses the output of the layer; at test time
            the output is multiplied by ``1 - final_mask`` (NLLB's ``moe_fom``).
        allow_future_leak: True allows routers in which experts choose tokens in a causal model; the
            routing of a token then depends on later tokens.
        router_input: Tokens that the router reads: ``normed`` as the experts read them, or
            ``residual`` before the norm of the layer (Gemma 4, whose head has a norm of its own).
    """

    every: Natural = 2
    last: Natural = 0
    layers: tuple[LayerIndex, ...] = ()
    overrides: tuple[LayerOverride, ...] = ()
    num_experts: Experts = 8
    expert_dim: Positive = 512
    expert_dims: tuple[Positive, ...] = ()
    latent_dim: Natural = 0
    gated: bool | None = None
    group_size: Positive = 1024
    router: routing.Router = dataclasses.field(default_factory=routing.presets.switch)
    transport: TransportName = "auto"
    exchange: ExchangeName = "gspmd"
    exchange_buffer: Growth | None = None
    shared: SharedConfig = SharedConfig()
    extra_dense: Literal["none", "before", "after"] = "none"
    expert_dropout: Chance = 0.0
    expert_mask: Chance = 0.0
    final_mask: Chance = 0.0
    allow_future_leak: bool = False
    router_input: Literal["normed", "residual"] = "normed"

    def __post_init__(self):
        super().__post_init__()
        if self.expert_dims and self.num_experts % len(self.expert_dims):
            raise ConfigError(
                f"model.moe.expert_dims has {len(self.expert_dims)} widths, which do not divide "
                f"num_experts={self.num_experts}: change one of them"
            )
        if self.router.free.count and self.exchange_buffer is not None:
            raise ConfigError(
                "model.moe.exchange_buffer counts tokens without a row as unrouted, even if they "
                "have a free expert of model.moe.router.free: unset one of them"
            )
        check_transport(self)
        try:
            self.router.check(self.num_experts)
        except ConfigError as error:
            raise ConfigError(f"model.moe.router: {error}") from error

    def moe_layers(self, num_layers: int) -> tuple[int, ...]:
        """Returns the indices, from 0, of the layers that have experts.

        Raises:
            ConfigError: If a listed layer does not exist or has an override but no experts.
        """
        chosen = self.layers or tuple(
            i for i in range(num_layers) if self.every > 0 and (i + 1) % self.every == 0
        )
        chosen = tuple(sorted(chosen))[-self.last if not self.layers else 0 :]
        for layer in (*chosen, *(i for other in self.overrides for i in other.layers)):
            if not 0 <= layer < num_layers:
                raise ConfigError(
                    f"model.moe names layer {layer}, but layers are 0 to {num_layers - 1}"
                )
        strays = {i for other in self.overrides for i in other.layers} - set(chosen)
        if strays and chosen:
            raise ConfigError(
                f"model.moe.overrides names layer {min(strays)}, which has no experts: the MoE "
                f"layers are {', '.join(map(str, chosen))}"
            )
        return chosen

    def check_layers(self, setting: str, num_layers: int) -> None:
        """Rejects settings that name no layer, or one layer twice.

        Args:
            setting: Name of the group of settings, for messages.
            num_layers: Number of layers in the stack.

        Raises:
            ConfigError: If so; the message names the setting to change.
        """
        check_twice(f"{setting}.layers", [self])
        check_twice(f"{setting}.overrides", self.overrides)
        if not self.layers and self.every > num_layers:
            raise ConfigError(
                f"{setting}.every={self.every} is beyond the {num_layers} layers, so that none has "
                f"experts: lower it, or set {setting}.every=0 for a dense model"
            )
        chosen = len(self.moe_layers(num_layers))
        if chosen and self.last > chosen:
            raise ConfigError(
                f"{setting}.last={self.last}, but only {chosen} of the {num_layers} layers can "
                f"have experts with every={self.every}: lower one of them"
            )
        if self.expert_dims and any(other.expert_dim for other in self.overrides):
            raise ConfigError(
                f"{setting}.overrides sets expert_dim, which {setting}.expert_dims="
                f"{self.expert_dims} replaces in every layer: unset one of them"
            )

    def at(self, layer: int) -> MoEConfig:
        """Returns the configuration of one MoE layer, with its overrides applied."""
        config = dataclasses.replace(self, every=1, last=0, layers=(), overrides=())
        for override in self.overrides:
            if layer in override.layers:
                config = override.applied(config)
        return config

    def check_expert(self, expert: object) -> None:
        """Rejects an expert that differs from this configuration.

        Args:
            expert: Configuration of one expert: a feed-forward network, or the projections of an
                attention, which have no ``F``.

        Raises:
            ConfigError: If they differ, or if this configuration describes several layers.
        """
        if self.layers or self.last or self.overrides:
            raise ConfigError(
                "this MoEConfig describes several layers: use config.at(layer) for one of them"
            )
        if not isinstance(expert, FeedForwardConfig):
            return
        if not self.expert_dims and expert.hidden != self.expert_dim:
            raise ConfigError(
                f"MoEConfig(expert_dim={self.expert_dim}) and FeedForwardConfig(hidden="
                f"{expert.hidden}) give the experts two widths: make them equal"
            )
        if self.gated is not None and expert.gated != self.gated:
            raise ConfigError(
                f"MoEConfig(gated={self.gated}) and FeedForwardConfig(gated={expert.gated}) "
                "describe different experts: make them equal"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """The hidden widths ``F`` of the experts; each width has equally many experts."""
        return self.expert_dims or (self.expert_dim,)

    @property
    def mean_expert_dim(self) -> float:
        """The mean of ``F`` over the experts."""
        return sum(self.widths) / len(self.widths)


@runtime_checkable
class NamesLayers(Protocol):
    """Settings that name layers by their indices."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices, from 0, of the layers."""


def check_twice(setting: str, parts: Iterable[NamesLayers]) -> None:
    """Rejects settings in which a layer is named twice.

    Args:
        setting: Name of the setting, for messages.
        parts: Groups of settings that name layers.

    Raises:
        ConfigError: If a layer is named twice; the message names the setting and the layer.
    """
    named = collections.Counter(i for part in parts for i in part.layers)
    for layer, times in named.items():
        if times > 1:
            raise ConfigError(f"{setting} names layer {layer} twice: name it once")
