"""The settings that decoder-only and encoder-decoder models share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax
from jaxtyping import Array, Float

from moe_jax.attend import Kernel, Needs
from moe_jax.errors import ConfigError
from moe_jax.models.stack import Remat
from moe_jax.nn.adapted import LoRA
from moe_jax.nn.attention import AttentionConfig, Details
from moe_jax.nn.attention_experts import AttentionExpertsConfig, Projections
from moe_jax.nn.block import BlockConfig
from moe_jax.nn.feed_forward import Activation, FeedForwardConfig
from moe_jax.nn.latent import Latent, LatentConfig
from moe_jax.nn.moe import MoEAux
from moe_jax.nn.moe_config import MoEConfig, check_twice
from moe_jax.nn.norm import NormConfig
from moe_jax.nn.positions import Learned, Positions, Rotary, Sinusoidal, T5Relative
from moe_jax.ranges import (
    Chance,
    Factor,
    LayerIndex,
    Natural,
    NonNegative,
    Offset,
    Positive,
    Ranged,
)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The length of a sequence.

    Attributes:
        inputs: Number of tokens of the encoder, or of a decoder without encoder.
        targets: Number of tokens of a decoder with an encoder.
    """

    inputs: int
    targets: int = 0


@dataclasses.dataclass(frozen=True)
class AttentionOverride(Ranged):
    """Settings of attention that differ in some layers.

    Attributes:
        every: Period of these layers: 2 selects the layers 1, 3, ...; 0 selects ``layers`` alone.
        layers: Indices of layers, from 0.
        rotary: False turns rotary positions off in these layers (NoPE).
        details: Details of attention in these layers, instead of the model's.
        positions: Rotary positions of these layers; ``None`` for the model's.
        num_kv_heads: Number of heads of keys and values in these layers; 0 for the model's.
        head_dim: Width ``D`` of a head in these layers; 0 for the model's.
    """

    every: Natural = 0
    layers: tuple[LayerIndex, ...] = ()
    rotary: bool = True
    details: Details = Details()
    positions: Rotary | None = None
    num_kv_heads: Natural = 0
    head_dim: Natural = 0

    def __post_init__(self):
        super().__post_init__()
        if self.positions is not None and not self.rotary:
            raise ConfigError(
                "model.attention_overrides: an override with rotary=False has no positions; unset "
                "one of them"
            )

    def holds(self, layer: int) -> bool:
        """Returns True if the settings apply to ``layer``."""
        return layer in self.layers or (self.every > 0 and (layer + 1) % self.every == 0)

    def applied(self, attention: AttentionConfig) -> AttentionConfig:
        """Returns the attention of the model with the settings that this override replaces."""
        return dataclasses.replace(
            attention,
            details=self.details,
            rotary=(self.positions or attention.rotary) if self.rotary else None,
            num_kv_heads=self.num_kv_heads or attention.num_kv_heads,
            head_dim=self.head_dim or attention.head_dim,
        )


@dataclasses.dataclass(frozen=True)
class SparseLayer:
    """One layer with experts.

    Attributes:
        setting: Setting of the model that describes the layer, such as ``encoder_moe``.
        index: Index of the layer in its stack, from 0.
        moe: Settings of the experts.
        stack: Name of the stack, ``encoder`` or ``decoder``; empty if the model has one stack.
        widths: Width of the experts' inputs and width of the experts' outputs.
    """

    setting: str
    index: int
    moe: MoEConfig
    stack: str
    widths: tuple[int, int]

    @property
    def of_inputs(self) -> bool:
        """True if the layer reads ``data.seq_length`` tokens; False if it reads the targets."""
        return self.stack != "decoder"

    @property
    def in_attention(self) -> bool:
        """True if the experts project for attention, False if they are feed-forward networks."""
        return self.setting == "attention_experts"

    @property
    def name(self) -> str | int:
        """Index of the layer, behind ``encoder`` or ``decoder`` and ``attention`` if they apply."""
        prefixes = [self.stack] * bool(self.stack) + ["attention"] * self.in_attention
        return " ".join([*prefixes, str(self.index)]) if prefixes else self.index


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reading:
    """The output of a model for a batch.

    Attributes:
        hidden: Hidden states ``(B, L, M)`` for the head.
        reports: Reports of all MoE layers, in the order of ``sparse_layers``.
        ahead: Hidden states ``(B, L, M)`` for the head, one array for each of the tokens 2, 3, ...
            ahead that the model predicts.
    """

    hidden: Float[Array, "B L M"]
    reports: tuple[MoEAux, ...]
    ahead: tuple[Float[Array, "B L M"], ...] = ()


@dataclasses.dataclass(frozen=True)
class ModelConfig(Ranged):
    """A transformer.

    Attributes:
        width: Model width ``M``.
        num_heads: Number ``H`` of attention heads.
        num_kv_heads: Number of heads of keys and values; 0 for ``num_heads``.
        head_dim: Width ``D`` of a head.
        mlp_dim: Hidden width ``F`` of the dense layers.
        activation: Activation function of dense layers and experts.
        gated: True for gated linear units in dense layers, and in experts unless ``moe.gated``
            differs.
        mlp_bias: True for biases in dense layers and experts.
        mlp_limit: Bound on both factors of gated units (gpt-oss: 7); 0 disables clipping.
        mlp_up_offset: Number added to the linear factor of gated units (gpt-oss: 1).
        positions: Encoding of the tokens' positions.
        attention: Options of multi-head attention, or sizes of DeepSeek's latent attention.
        attention_overrides: Attention settings of single layers; the first override that matches a
            layer applies.
        attention_kernel: Implementation of attention: ``splash`` (TPU), ``cudnn`` (GPU), ``blocks``
            (XLA, on every device), or ``auto`` for the one of the platform; layers that it cannot
            express take ``blocks``, and a run names them at its start.
        attention_experts: Experts that compute the queries, keys and values of self-attention.
        norm: Norms of every residual branch and of the output of the model.
        tie_embeddings: True uses the transposed embedding as the output projection.
        scale_embedding: True multiplies embeddings by ``sqrt(M)``.
        scale_head: True divides the inputs of the output projection by ``sqrt(M)`` (tied T5).
        embedding_factor: Factor of embeddings (Granite: 12).
        residual_factor: Factor of the output of every residual branch (Granite: 0.22).
        logit_factor: Factor of logits (Granite: 1/6).
        logit_cap: Bound ``c`` of logits, which become ``c tanh(logits / c)`` (Gemma 4: 30); 0 means
            no bound.
        layer_scale: True multiplies the output of every layer by a learned number (Gemma 4).
        dropout: Dropout rate of residual branches in training.
        init_scale: Scale ``s`` of the initial weights, truncated normals of variance ``s / fan-in``
            (Switch, 2101.03961, section 2.4, uses 0.1).
        scan_layers: True compiles repeating layers once. Results are equal, except that Adafactor
            then clips and scales the stacked layers as one array.
        remat: Activations that the backward pass recomputes: ``none``, ``full`` (all), ``dots``
            (all but matrix products), ``dots_no_batch`` (all but products with weights).
        compute_dtype: Type of activations; parameters, router, norms and softmax stay float32.
        lora: Low-rank adapters (LoRA), the only parameters that are then trained; ``None`` for
            none. ``training.start_from`` names the model that they adapt.
    """

    width: Positive = 128
    num_heads: Positive = 4
    num_kv_heads: Natural = 0
    head_dim: Positive = 32
    mlp_dim: Positive = 512
    activation: Activation = "gelu"
    gated: bool = False
    mlp_bias: bool = False
    mlp_limit: NonNegative = 0.0
    mlp_up_offset: Offset = 0.0
    positions: Positions = Rotary()
    attention: Details | Latent = Details()
    attention_overrides: tuple[AttentionOverride, ...] = ()
    attention_kernel: Kernel = "auto"
    attention_experts: AttentionExpertsConfig = AttentionExpertsConfig()
    norm: NormConfig = NormConfig()
    tie_embeddings: bool = True
    scale_embedding: bool = True
    scale_head: bool = False
    embedding_factor: Factor = 1.0
    residual_factor: Factor = 1.0
    logit_factor: Factor = 1.0
    logit_cap: NonNegative = 0.0
    layer_scale: bool = False
    dropout: Chance = 0.0
    init_scale: Factor = 1.0
    scan_layers: bool = True
    remat: Remat = "none"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    lora: LoRA | None = None

    def __post_init__(self):
        super().__post_init__()
        self._check_kv_heads("model", self.num_kv_heads)
        self._check_positions()
        self._check_overrides()
        if isinstance(self.attention, Latent) and not isinstance(self.positions, Rotary):
            raise ConfigError(
                "latent attention rotates part of each head: set model.positions.type=Rotary"
            )
        if isinstance(self.attention, Latent) and self.attention_overrides:
            raise ConfigError("latent attention has no details: unset model.attention_overrides")
        experts = self.attention_experts
        if isinstance(self.attention, Latent) and (experts.every or experts.layers):
            raise ConfigError(
                "latent attention has no experts: unset model.attention_experts.every and .layers"
            )
        if experts.every or experts.layers:
            self._check_attention_of_experts()

    def _check_attention_of_experts(self) -> None:
        """Rejects maps of tokens that experts of attention do not have."""
        for other in [self.attention, *(other.details for other in self.attention_overrides)]:
            for name in ("keys_as_values", "output_gate"):
                if isinstance(other, Details) and getattr(other, name):
                    raise ConfigError(
                        "experts of attention project queries, keys and values: unset "
                        f"model.attention_experts, or {name} in model.attention and "
                        "model.attention_overrides"
                    )

    def _check_kv_heads(self, owner: str, num_kv_heads: int) -> None:
        if self.num_heads % (num_kv_heads or self.num_heads):
            raise ConfigError(
                f"model.num_heads={self.num_heads} is not a multiple of "
                f"{owner}.num_kv_heads={num_kv_heads}"
            )

    def _check_overrides(self) -> None:
        """Rejects heads of single layers that do not fit the model."""
        for i, other in enumerate(self.attention_overrides):
            owner = f"model.attention_overrides[{i}]"
            self._check_kv_heads(owner, other.num_kv_heads)
            rotates = other.rotary and isinstance(other.positions or self.positions, Rotary)
            if rotates and other.head_dim % 2:
                raise ConfigError(
                    f"{owner}.head_dim={other.head_dim} is odd, and rotary positions turn pairs of "
                    "features: make it even"
                )

    def _check_positions(self) -> None:
        positions, name, rotated = self.positions, "head_dim", self.head_dim
        if isinstance(self.attention, Latent):
            name, rotated = "attention.rotary_dim", self.attention.rotary_dim
        if isinstance(positions, Rotary) and rotated % 2:
            raise ConfigError(
                f"model.{name}={rotated} is odd, and rotary positions turn pairs of features: make "
                "it even"
            )
        if isinstance(positions, Sinusoidal) and self.width < 4:
            raise ConfigError(
                f"model.width={self.width} is too small for sinusoidal positions: use at least 4"
            )
        if isinstance(positions, T5Relative):
            exact = positions.buckets // 2
            if positions.max_distance <= exact:
                raise ConfigError(
                    f"model.positions.buckets={positions.buckets} and max_distance="
                    f"{positions.max_distance}: relative positions need a distance above half "
                    "of the buckets; change one of them"
                )

    def check_layers(self) -> None:
        """Rejects settings that name a layer which does not exist, or one layer twice.

        Raises:
            ConfigError: If there is such a setting, which the message names.
        """
        stacks = self._stacks()
        for setting, moe, num_layers in stacks:
            moe.check_layers(f"model.{setting}", num_layers)
        most = max(num_layers for _, _, num_layers in stacks)
        self.attention_experts.check_layers(most)
        check_twice("model.attention_overrides", self.attention_overrides)
        for other in self.attention_overrides:
            beyond = [i for i in other.layers if not 0 <= i < most]
            if beyond or other.every > most:
                name = f"layer {beyond[0]}" if beyond else f"every={other.every}"
                raise ConfigError(
                    f"model.attention_overrides has {name}, but layers are 0 to {most - 1}: change "
                    "it or remove it"
                )

    def check_length(self, length: int, setting: str) -> None:
        """Rejects sequences that are longer than the learned positions.

        Args:
            length: Number of tokens of a sequence.
            setting: Setting that holds this number.

        Raises:
            ConfigError: If the sequences are longer; the message names both settings.
        """
        if isinstance(self.positions, Learned) and self.positions.length < length:
            raise ConfigError(
                f"model.positions.length={self.positions.length} is shorter than "
                f"{setting}={length}: all later tokens would share its last position; raise it"
            )

    def attention_at(self, layer: int) -> AttentionConfig | LatentConfig:
        """Returns the self-attention of a layer."""
        if isinstance(self.attention, Details):
            return self._plain_attention_at(layer)
        # Other positions are rejected when the configuration is created.
        assert isinstance(self.positions, Rotary)
        return LatentConfig(
            width=self.width,
            num_heads=self.num_heads,
            latent=self.attention,
            rotary=self.positions,
            norm_eps=self.norm.eps,
            init_scale=self.init_scale,
            kernel=self.attention_kernel,
        )

    def _plain_attention_at(self, layer: int) -> AttentionConfig:
        """Returns the self-attention of a layer of a model without latent attention."""
        assert isinstance(self.attention, Details)
        rotary = self.positions if isinstance(self.positions, Rotary) else None
        plain = AttentionConfig(
            width=self.width,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads or self.num_heads,
            head_dim=self.head_dim,
            rotary=rotary,
            details=self.attention,
            norm_eps=self.norm.eps,
            init_scale=self.init_scale,
            kernel=self.attention_kernel,
        )
        found = next((other for other in self.attention_overrides if other.holds(layer)), None)
        return plain if found is None else found.applied(plain)

    def attentions(self) -> dict[str, Needs]:
        """Returns the properties of the attention of every layer, by the layer's name."""
        return {
            f"{stack} {index}".strip(): self._needs(self.attention_at(index))
            for stack, count in self._attention_stacks()
            for index in range(count)
        }

    def _attention_stacks(self) -> tuple[tuple[str, int], ...]:
        """Returns name and number of the layers of each stack."""
        return tuple(
            (f"{setting.removesuffix('moe').rstrip('_')} layer".strip(), count)
            for setting, _, count in self._stacks()
        )

    def _needs(self, attention: AttentionConfig | LatentConfig) -> Needs:
        if isinstance(attention, LatentConfig):
            sizes, kv_heads, sinks = attention.latent, self.num_heads, False
            widths = sizes.plain_dim + sizes.rotary_dim, sizes.value_dim
        else:
            kv_heads, sinks = attention.num_kv_heads, attention.details.sinks
            widths = attention.head_dim, attention.head_dim
        return Needs(
            dtype=self.compute_dtype,
            heads=self.num_heads,
            kv_heads=kv_heads,
            key_dim=widths[0],
            value_dim=widths[1],
            relative=isinstance(self.positions, T5Relative),
            sinks=sinks,
        )

    def sparse_layers(self) -> tuple[SparseLayer, ...]:
        """Returns the layers with experts, in the order of a model's reports."""
        return tuple(
            layer
            for setting, moe, num_layers in self._stacks()
            for layer in self._sparse_layers_of(setting, moe, num_layers)
        )

    def _sparse_layers_of(
        self, setting: str, moe: MoEConfig, num_layers: int
    ) -> Iterator[SparseLayer]:
        stack = setting.removesuffix("moe").rstrip("_")
        in_attention = self.attention_experts.moe_layers(num_layers)
        sparse = moe.moe_layers(num_layers)
        for index in range(num_layers):
            if index in in_attention:
                widths = self.width, Projections(self._plain_attention_at(index)).columns
                experts = self.attention_experts.layer
                yield SparseLayer("attention_experts", index, experts, stack, widths)
            if index in sparse:
                width = moe.latent_dim or self.width
                yield SparseLayer(setting, index, moe.at(index), stack, (width, width))

    def _stacks(self) -> tuple[tuple[str, MoEConfig, int], ...]:
        """Returns the setting of the experts, its value and the number of layers of each stack."""
        raise NotImplementedError

    def _refuse_leaks(self) -> None:
        """Rejects expert choice in a causal stack, unless a setting allows it.

        Raises:
            ConfigError: If a token's experts would depend on later tokens.
        """
        for layer in self.sparse_layers():
            leaks = layer.moe.router.experts_choose and layer.stack != "encoder"
            if leaks and not layer.moe.allow_future_leak:
                raise ConfigError(
                    "expert choice in a causal decoder routes a token by later tokens; set "
                    f"model.{layer.setting}.allow_future_leak=True to measure this leak"
                )

    def _check_carried(self) -> None:
        """Rejects layers of one stack whose routers pass on different numbers of values.

        Raises:
            ConfigError: If the router of a layer cannot read what the one before passes on.
        """
        widths: dict[tuple[str, str], int] = {}
        for layer in self.sparse_layers():
            width = layer.moe.router.carried_width(layer.moe.num_experts)
            before = widths.setdefault((layer.stack, layer.setting), width) if width else width
            if before != width:
                raise ConfigError(
                    f"a router of model.{layer.setting} passes {before} values per token to the "
                    f"next, but the router of layer {layer.index} reads {width}: give both layers "
                    "the same head and the same number of experts"
                )

    def blocks(self, num_layers: int, moe: MoEConfig, *, cross: bool = False) -> list[BlockConfig]:
        """Returns the configuration of every layer of a stack, in order."""
        dense = FeedForwardConfig(
            width=self.width,
            hidden=self.mlp_dim,
            activation=self.activation,
            gated=self.gated,
            bias=self.mlp_bias,
            limit=self.mlp_limit,
            up_offset=self.mlp_up_offset,
            init_scale=self.init_scale,
        )
        sparse = moe.moe_layers(num_layers)
        in_attention = self.attention_experts.moe_layers(num_layers)

        def block(layer: int) -> BlockConfig:
            mixture, inner = moe.at(layer) if layer in sparse else None, dense
            if mixture is not None:
                gated = self.gated if mixture.gated is None else mixture.gated
                inner = dataclasses.replace(dense, hidden=mixture.expert_dim, gated=gated)
            return BlockConfig(
                attention=self.attention_at(layer),
                feed_forward=inner,
                moe=mixture,
                dropout=self.dropout,
                residual_factor=self.residual_factor,
                norm=self.norm,
                extra=dense,
                cross_attention=self._plain_attention_at(layer) if cross else None,
                attention_experts=self.attention_experts.layer if layer in in_attention else None,
                output_scale=self.layer_scale,
            )

        return [block(layer) for layer in range(num_layers)]
