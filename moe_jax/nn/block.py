"""One layer of a transformer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from moe_jax.attend import PagedView, View
from moe_jax.errors import ConfigError
from moe_jax.nn.attention import KV, Attention, AttentionConfig
from moe_jax.nn.attention_experts import ProjectedAttention, Projections
from moe_jax.nn.dropout import dropout
from moe_jax.nn.feed_forward import FeedForward, FeedForwardConfig
from moe_jax.nn.init import constant
from moe_jax.nn.latent import LatentAttention, LatentConfig
from moe_jax.nn.mode import Mode
from moe_jax.nn.moe import ConfiguredMoE, MoEAux
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.norm import NormConfig, norm
from moe_jax.nn.router import RouterLayer
from moe_jax.parallel import constrain
from moe_jax.routing.part import NOTHING

# The keys and values of a layer: of its self-attention (``self``) and of a memory (``cross``).
LayerCache = dict[str, KV]


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """Configuration of a layer: attention, then a feed-forward network or experts.

    Attributes:
        attention: The self-attention.
        feed_forward: The dense network, or one expert.
        moe: The MoE layer that takes the place of the network; ``None`` for a dense layer.
        dropout: Dropout rate of all residual branches in training.
        residual_factor: Factor of the output of all residual branches.
        norm: Norms of every branch.
        extra: The dense sub-layer that ``moe.extra_dense`` puts before or after the experts.
        cross_attention: Attention to the memory, after the self-attention, or ``None``.
        attention_experts: The MoE layer that projects tokens for the self-attention, or ``None``.
        output_scale: True multiplies the output of the layer by a learned number.
    """

    attention: AttentionConfig | LatentConfig
    feed_forward: FeedForwardConfig
    moe: MoEConfig | None = None
    dropout: float = 0.0
    residual_factor: float = 1.0
    norm: NormConfig = NormConfig()
    extra: FeedForwardConfig | None = None
    cross_attention: AttentionConfig | None = None
    attention_experts: MoEConfig | None = None
    output_scale: bool = False

    @property
    def named_mixtures(self) -> dict[str, MoEConfig]:
        """The MoE layers by name in the order of their reports: in the attention, then after it."""
        named = {"attention_experts": self.attention_experts, "feed_forward": self.moe}
        return {name: moe for name, moe in named.items() if moe is not None}

    @property
    def mixtures(self) -> tuple[MoEConfig, ...]:
        """The MoE layers in the order of their reports."""
        return tuple(self.named_mixtures.values())

    @property
    def carried_widths(self) -> dict[str, int]:
        """Values per token that the router of a sub-layer passes on, by name, if it passes any."""
        widths = {
            name: moe.router.carried_width(moe.num_experts)
            for name, moe in self.named_mixtures.items()
        }
        return {name: width for name, width in widths.items() if width}

    @property
    def extra_dense(self) -> str:
        """Position of the extra sub-layer: ``before`` or ``after`` the experts, or ``none``."""
        return "none" if self.moe is None else self.moe.extra_dense


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """Inputs that all layers of one forward pass share.

    Attributes:
        view: Mask and positions of the self-attention, over the tokens or the cache.
        valid: Mask ``(B, L)``, False for padding.
        token_ids: Ids ``(B, L)`` of the tokens, int32, for routers that hash them.
        memory: Memory ``(B, T, M)`` of the cross-attention; ``None`` if the model has none, or if
            the cache holds its keys and values.
        memory_view: Mask and positions of the cross-attention.
    """

    view: View | PagedView
    valid: Bool[Array, "B L"]
    token_ids: Int[Array, "B L"]
    memory: Float[Array, "B T M"] | None = None
    memory_view: View | None = None


class Block(nnx.Module):
    """Transformer layer: residual branches, with norms of their inputs, their outputs or both."""

    def __init__(self, config: BlockConfig, key: PRNGKeyArray):
        """Initialises the sub-layers and their norms."""
        attention_key, feed_forward_key = jax.random.split(key)
        self._make_norms("attention", config)
        self.attention: Attention | LatentAttention
        if config.attention_experts is None:
            self.attention = _attention(config.attention, attention_key)
        else:
            attention, experts_key = _projected(config.attention), jax.random.fold_in(key, 4)
            self.attention_experts = ConfiguredMoE(
                config.attention_experts, Projections(attention), experts_key
            )
            self.attention = ProjectedAttention(attention, attention_key)
        self._make_norms("feed_forward", config)
        self.feed_forward: FeedForward | ConfiguredMoE
        if config.moe is None:
            self.feed_forward = FeedForward(config.feed_forward, feed_forward_key)
        else:
            self.feed_forward = ConfiguredMoE(
                config.moe, config.feed_forward, feed_forward_key, config.norm
            )
        if config.cross_attention is not None:
            self._make_norms("cross", config)
            self.cross = Attention(config.cross_attention, jax.random.fold_in(key, 3))
        if config.extra_dense != "none":
            if config.extra is None:
                raise ConfigError(f"extra_dense={config.extra_dense!r} needs the sub-layer extra")
            self._make_norms("extra", config)
            self.extra = FeedForward(config.extra, jax.random.fold_in(key, 2))
        if config.output_scale:
            self.output_scale = constant(1.0, (1,), (None,))
        self.config = config

    def __call__(
        self,
        x: Float[Array, "B L M"],
        context: Context,
        *,
        mode: Mode,
        rng: PRNGKeyArray | None,
        records: tuple[Int[Array, "B L _"], ...] | None = None,
        cache: LayerCache | None = None,
        carried: Mapping[str, Float[Array, "B L _"]] = NOTHING,
    ) -> tuple[Float[Array, "B L M"], tuple[MoEAux, ...], LayerCache | None]:
        """Returns the output of the layer, its reports and its cache.

        Args:
            x: Tokens ``(B, L, M)``.
            context: Inputs that all layers share.
            mode: Capacity of the experts, and whether reports hold the choices.
            rng: Random key of dropout and routing in training, or ``None``.
            records: Recorded choices ``(B, L, K)`` of each MoE layer, for the router ``forced``.
            cache: Keys and values of the earlier tokens, or ``None``.
            carried: Values ``(B, L, D)`` of the routers of the layers before, by the name of the
                MoE layer in its block: ``attention_experts`` or ``feed_forward``.

        Returns:
            The output ``(B, L, M)``; a report per MoE layer, none for a dense layer; and the cache
            with the keys and values of these tokens added, or ``None`` without a cache.
        """
        keys = (None,) * 5 if rng is None else jax.random.split(rng, 5)
        sources, reports = self._sources(x, context, mode, rng, records, carried)
        with jax.named_scope("attention"):
            mixed, cache = self._attend(sources, context.view, cache)
        x = self._add(x, mixed, keys[0], "attention")
        if self.config.cross_attention is not None:
            with jax.named_scope("attention"):
                mixed, cache = self._attend_memory(x, context, cache)
            x = self._add(x, mixed, keys[4], "cross")
        if self.config.extra_dense == "before":
            x = self._add(x, self.extra(self.branch_input("extra", x)), keys[3], "extra")
        inputs = self.branch_input("feed_forward", x)
        if isinstance(self.feed_forward, FeedForward):
            y = self.feed_forward(inputs)
        else:
            y, aux = self.feed_forward(
                inputs,
                context.valid,
                mode=mode,
                rng=keys[1],
                token_ids=context.token_ids,
                record=None if records is None else records[-1],
                carried=carried.get("feed_forward"),
                residual=x,
            )
            reports += (aux,)
        x = self._add(x, y, keys[2], "feed_forward")
        if self.config.extra_dense == "after":
            x = self._add(x, self.extra(self.branch_input("extra", x)), keys[3], "extra")
        if self.config.output_scale:
            x = x * self.output_scale[...].astype(x.dtype)
        return x, reports, cache

    @property
    def source_width(self) -> int:
        """Width ``N`` of the attention's input: of tokens, or of the projections of experts."""
        attention = self.config.attention
        if self.config.attention_experts is None:
            return attention.width
        return Projections(_projected(attention)).columns

    @property
    def mixtures(self) -> dict[str, ConfiguredMoE]:
        """The MoE layers by name, in the order of their reports."""
        names = ("attention_experts", "feed_forward")
        layers = {name: getattr(self, name, None) for name in names}
        return {name: each for name, each in layers.items() if isinstance(each, ConfiguredMoE)}

    @property
    def routers(self) -> tuple[RouterLayer, ...]:
        """The routers of the MoE layers, in the order of their reports."""
        return tuple(layer.router for layer in self.mixtures.values())

    def _sources(
        self,
        x: Array,
        context: Context,
        mode: Mode,
        rng: Array | None,
        records: tuple[Array, ...] | None,
        carried: Mapping[str, Array],
    ) -> tuple[Array, tuple[MoEAux, ...]]:
        """Returns the attention's input ``(B, L, N)``, and a report if experts project it."""
        x = self.branch_input("attention", x)
        if self.config.attention_experts is None:
            return x, ()
        x, aux = self.attention_experts(
            x,
            context.valid,
            mode=mode,
            rng=None if rng is None else jax.random.fold_in(rng, 5),
            token_ids=context.token_ids,
            record=None if records is None else records[0],
            carried=carried.get("attention_experts"),
        )
        return x, (aux,)

    def _attend(
        self, x: Array, view: View | PagedView, cache: LayerCache | None
    ) -> tuple[Array, LayerCache | None]:
        kv = self.attention.project(x, view.positions)
        if cache is not None:
            kv = jax.tree.map(view.put, cache["self"], kv)
            cache = {**cache, "self": kv}
        return self.attention(x, view, kv), cache

    def _attend_memory(
        self, x: Array, context: Context, cache: LayerCache | None
    ) -> tuple[Array, LayerCache | None]:
        view = context.memory_view
        if view is None:
            raise ValueError("cross-attention needs a memory_view in its context")
        if context.memory is not None:
            kv = self.cross.project(context.memory, view.positions)
        elif cache is not None:
            kv = cache["cross"]
        else:
            raise ValueError("cross-attention needs a memory, or a cache that holds its keys")
        if cache is not None:
            cache = {**cache, "cross": kv}
        return self.cross(self.branch_input("cross", x), view, kv), cache

    def _make_norms(self, branch: str, config: BlockConfig) -> None:
        """Initialises ``{branch}_norm`` of the input and ``{branch}_output_norm`` of the output."""
        for place, name in (("input", f"{branch}_norm"), ("output", f"{branch}_output_norm")):
            if config.norm.place in (place, "both"):
                setattr(self, name, norm(config.norm, config.attention.width))

    def branch_input(self, name: str, x: Array) -> Array:
        """Returns the input of the branch ``name`` for the tokens ``x (B, L, M)`` before it."""
        return x if self.config.norm.place == "output" else getattr(self, f"{name}_norm")(x)

    def _add(self, x: Array, branch: Array, key: Array | None, name: str) -> Array:
        """Returns the sum of ``x`` and the output of a branch."""
        if self.config.norm.place != "input":
            branch = getattr(self, f"{name}_output_norm")(branch)
        if self.config.residual_factor != 1:
            branch = branch * self.config.residual_factor
        return constrain(x + dropout(branch, self.config.dropout, key), "batch", "length")


def _attention(
    config: AttentionConfig | LatentConfig, key: PRNGKeyArray
) -> Attention | LatentAttention:
    if isinstance(config, LatentConfig):
        return LatentAttention(config, key)
    return Attention(config, key)


def _projected(config: AttentionConfig | LatentConfig) -> AttentionConfig:
    """Returns the configuration of an attention whose tokens experts project."""
    if isinstance(config, LatentConfig):
        raise ConfigError("latent attention has no experts: unset attention_experts")
    return config
