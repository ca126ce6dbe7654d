"""Where mixture-of-experts layers sit and what they are."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable
from typing import Literal, Protocol

from moe_jax import routing
from moe_jax.errors import ConfigError
from moe_jax.nn.feed_forward import FeedForwardConfig
from moe_jax.nn.shared import SharedConfig
from moe_jax.ranges import Chance, Experts, LayerIndex, Natural, Positive, Ranged
from moe_jax.transport import ExchangeName, TransportName
from moe_jax.transport import check as check_transport


@dataclasses.dataclass(frozen=True)
class LayerOverride(Ranged):
    """What differs in some MoE layers.

    Attributes:
        layers: their indices, from 0.
        router: their router; ``None`` for that of the others.
        num_experts: their ``E``; 0 for that of the others.
        expert_dim: their ``F``; 0 for that of the others.
    """

    layers: tuple[LayerIndex, ...]
    router: routing.Router | None = None
    num_experts: Natural = 0
    expert_dim: Natural = 0

    def applied(self, config: MoEConfig) -> MoEConfig:
        """Returns ``config`` with what differs put in."""
        changed = {
            name: getattr(self, name)
            for name in ("router", "num_experts", "expert_dim")
            if getattr(self, name)
        }
        return dataclasses.replace(config, **changed)


@dataclasses.dataclass(frozen=True)
class MoEConfig(Ranged):
    """Where mixture-of-experts layers sit and what they are.

    Attributes:
        every: layers ``every-1, 2*every-1, ...`` are MoE, so 1 is every layer; 0 is none (dense).
        last: only so many of these, the last ones (V-MoE's last-n); 0 for all.
        layers: indices from 0 of the MoE layers, instead of ``every`` and ``last``.
        overrides: layers that differ, in their router or experts.
        num_experts: ``E``.
        expert_dim: ``F`` of each expert.
        expert_dims: widths of equally large groups of neighbouring experts, instead of
            ``expert_dim``, for experts of several sizes.
        gated: whether experts are gated linear units; ``None`` for as the dense layers are.
        group_size: ``S``; capacity is per group and expert. A batch that does not divide is padded.
        router: the router.
        transport: ``einsum`` (dispatch tensors), ``gather`` (slot table) or ``ragged`` (choices
            sorted into blocks of one expert: dropless routing where a device holds all experts).
        exchange: how slots reach the devices of their experts. ``gspmd``: XLA partitions a
            transpose; ``all_to_all``: the same said outright with ``shard_map``; ``ring``: tokens
            visit the experts in turn, for dropless routing, whose slots would be many.
        shared: a dense network beside the experts.
        extra_dense: a dense sub-layer of its own ``before`` or ``after`` the experts
            (sparse-dense stacking, ST-MoE appendix C).
        expert_dropout: dropout of the experts' output in training (Switch section 2.4).
        expert_mask: chance in training that a token loses an expert's whole output; at test time
            outputs are scaled by its complement (NLLB's ``moe_eom``).
        final_mask: the same for the output of the layer (NLLB's ``moe_fom``).
        allow_future_leak: let experts choose tokens in a causal model, where a token's routing
            then depends on later tokens.
    """

    every: Natural = 2
    last: Natural = 0
    layers: tuple[LayerIndex, ...] = ()
    overrides: tuple[LayerOverride, ...] = ()
    num_experts: Experts = 8
    expert_dim: Positive = 512
    expert_dims: tuple[Positive, ...] = ()
    gated: bool | None = None
    group_size: Positive = 1024
    router: routing.Router = dataclasses.field(default_factory=routing.presets.switch)
    transport: TransportName = "einsum"
    exchange: ExchangeName = "gspmd"
    shared: SharedConfig = SharedConfig()
    extra_dense: Literal["none", "before", "after"] = "none"
    expert_dropout: Chance = 0.0
    expert_mask: Chance = 0.0
    final_mask: Chance = 0.0
    allow_future_leak: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.expert_dims and self.num_experts % len(self.expert_dims):
            raise ConfigError(
                f"model.moe.expert_dims has {len(self.expert_dims)} widths, which do not divide "
                f"num_experts={self.num_experts}: change one of them"
            )
        check_transport(self)
        try:
            self.router.check(self.num_experts)
        except ConfigError as error:
            raise ConfigError(f"model.moe.router: {error}") from error

    def moe_layers(self, num_layers: int) -> tuple[int, ...]:
        """Returns the indices, from 0, of the layers that have experts.

        Raises:
            ConfigError: if a listed layer does not exist or has an override but no experts.
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
        """Refuses settings that name no layer, or one layer twice.

        Args:
            setting: that describes these layers, for messages.
            num_layers: of the stack.

        Raises:
            ConfigError: one line, naming the setting to change.
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
        """Returns the configuration of one MoE layer, with what differs there put in."""
        mine = dataclasses.replace(self, every=1, last=0, layers=(), overrides=())
        for other in self.overrides:
            if layer in other.layers:
                mine = other.applied(mine)
        return mine

    def check_expert(self, expert: object) -> None:
        """Refuses one expert that is not what this configuration says.

        Args:
            expert: a feed-forward network, or projections of attention, which have no ``F``.

        Raises:
            ConfigError: naming the setting, or that this configuration is of several layers.
        """
        if self.layers or self.last or self.overrides:
            raise ConfigError("this MoEConfig says where layers are: use config.at(layer) for one")
        if not isinstance(expert, FeedForwardConfig):
            return
        if not self.expert_dims and expert.hidden != self.expert_dim:
            raise ConfigError(
                f"MoEConfig(expert_dim={self.expert_dim}) and FeedForwardConfig(hidden="
                f"{expert.hidden}) are of experts of two widths: make them equal"
            )
        if self.gated is not None and expert.gated != self.gated:
            raise ConfigError(
                f"MoEConfig(gated={self.gated}) and FeedForwardConfig(gated={expert.gated}) are of "
                "two kinds of experts: make them equal"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """``F`` of each group of experts, of which there is one unless ``expert_dims`` says so."""
        return self.expert_dims or (self.expert_dim,)

    @property
    def mean_expert_dim(self) -> float:
        """Mean ``F`` over the experts."""
        return sum(self.widths) / len(self.widths)


class NamesLayers(Protocol):
    """A part of the configuration that names layers by their indices."""

    layers: tuple[int, ...]


def check_twice(setting: str, parts: Iterable[NamesLayers]) -> None:
    """Refuses a layer that is named twice.

    Raises:
        ConfigError: naming the setting and the layer.
    """
    named = collections.Counter(i for part in parts for i in part.layers)
    for layer, times in named.items():
        if times > 1:
            raise ConfigError(f"{setting} names layer {layer} twice: name it once")
