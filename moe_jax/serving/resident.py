"""A model as an engine computes it: choices in place of slots, and weights read where they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
from flax import nnx
from jaxtyping import Array, Float

from moe_jax.grouped import Choices, GateOn, on_separate
from moe_jax.models import Decoder
from moe_jax.models.lookahead import Lookahead
from moe_jax.nn.feed_forward import Experts
from moe_jax.nn.moe import ConfiguredMoE
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.parallel import axis_size
from moe_jax.serving.rows import Layered, by_rows, on_one_cpu
from moe_jax.transport import TABLE
from moe_jax.transport.requirements import Facts

# Copies of smaller matrices cost little, and programs with more experts take long to compile.
_SMALLEST, _MOST = 2**16, 512


class SeparateExperts(nnx.Module):
    """Experts whose matrices are arrays of their own, as ``moe_jax.grouped.on_separate`` reads."""

    def __init__(self, experts: Experts):
        """Copies the parameters of ``experts``; each matrix has its outputs first."""
        self.config = experts.config
        self.experts = nnx.List(
            nnx.Dict({name: nnx.Param(array) for name, array in own.items()})
            for own in experts.separate()
        )

    def on_choices(
        self,
        tokens: Float[Array, "T M"],
        gate: Float[Array, "T K"],
        choices: Choices,
        gate_on: GateOn = "out",
    ) -> Float[Array, "T M"]:
        """Returns the sums of the outputs of sorted choices; see ``moe_jax.grouped.on_choices``."""
        del gate  # ``choices`` has the gates in the order of the rows.
        dtype = tokens.dtype
        own = [{name: x[...].astype(dtype) for name, x in each.items()} for each in self.experts]
        return on_separate(self.config, own, tokens, choices, gate_on)


def resident(model: Decoder, smallest: int = _SMALLEST) -> Decoder:
    """Returns a model with the same outputs, for the steps of an engine on the current mesh.

    Experts compute the choices of a step in one grouped product, unless the settings of their layer
    need slots. On one CPU no layer is stacked, and every expert has its own matrices: XLA copies a
    part of an array before it multiplies it, and the steps of few tokens would copy all weights.
    Head and attention have their weights by rows, see ``moe_jax.serving.rows``.

    Args:
        model: Decoder; it stays as it is, and shares the arrays that need no copy.
        smallest: Number of entries of a matrix from which experts are separated.
    """
    return _resident(model, smallest)


def resident_modules(model: Decoder, smallest: int = _SMALLEST) -> list[Lookahead]:
    """Returns the lookahead modules of a model, as ``resident`` returns the model."""
    return [_resident(module, smallest) for module in model.lookahead]


def _resident(model: Layered, smallest: int) -> Layered:
    model = jax.tree.map(lambda leaf: leaf, model)
    for layer in _mixtures(model):
        layer.config = by_choice(layer.config)
    in_place = on_one_cpu() and _worth_separating(model, smallest)
    if in_place:
        model.layers = model.layers.unrolled()
    for layer in _mixtures(model):
        if in_place and isinstance(layer.experts, Experts):
            layer.experts = SeparateExperts(layer.experts)
    return by_rows(model)


def by_choice(config: MoEConfig) -> MoEConfig:
    """Returns the settings of a layer with a transport that computes choices, if one fits it.

    On a mesh that splits the experts, the settings ``all_to_all`` and ``ring`` stay: they compile
    for devices whose compiler refuses to send choices.
    """
    facts = Facts(config, axis_size("expert"))
    if facts.expert_shards > 1 and config.exchange in ("all_to_all", "ring"):
        return config
    for row in TABLE:
        if row.cost.computes == "choices" and row.unmet(facts) is None:
            return dataclasses.replace(config, transport=row.transport, exchange=row.exchange)
    return config


def _mixtures(model: Decoder | Lookahead) -> Iterator[ConfiguredMoE]:
    """Yields every MoE layer once; stacked layers are one."""
    for blocks in model.layers.parts:
        for block in blocks:
            yield from block.mixtures.values()


def _worth_separating(model: Decoder | Lookahead, smallest: int) -> bool:
    """Returns True if the experts of all layers are few, and their matrices large."""
    layers = [each for view in model.layers.layers() for each in view.block.mixtures.values()]
    experts = [layer.experts for layer in layers if layer.config.transport == "ragged"]
    sizes = [own.up[...].shape[-3:] for own in experts if isinstance(own, Experts)]
    if not sizes or len(sizes) < len(layers):
        return False
    return sum(e for e, _, _ in sizes) <= _MOST and min(m * f for _, m, f in sizes) >= smallest
