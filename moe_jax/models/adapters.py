"""Low-rank adapters of a model: their places, their names in a state, and their merge."""

from __future__ import annotations

import collections
import dataclasses
import functools
import zlib
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PRNGKeyArray

from moe_jax.errors import ConfigError
from moe_jax.models.config import ModelConfig
from moe_jax.models.decoder import Decoder
from moe_jax.models.encoder_decoder import EncoderDecoder
from moe_jax.models.parts import groups_of
from moe_jax.models.stored import Path, stored
from moe_jax.nn.adapted import Adapted, LoRA
from moe_jax.nn.projection import is_projection

_Model = TypeVar("_Model", bound=Decoder | EncoderDecoder)
_BASE, _FACTORS = "/base", ("/lora_a", "/lora_b")


def add_adapters(model: nnx.Module, lora: LoRA, key: PRNGKeyArray) -> None:
    """Gives adapters to all projections of a model that the groups name.

    The values of an adapter depend on the name of its layer, so scanning changes none.

    Args:
        model: Model of arrays or shapes.
        lora: Groups, rank and factor.
        key: Random key.
    """
    params = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    layers: dict[Path, list[str]] = collections.defaultdict(list)
    for path, place in stored(model).items():
        layers[place.path].append("/".join(map(str, ("params", *path))))
    stacked = {place.path for place in stored(model).values() if place.entry is not None}
    for path, param in params.items():
        groups = {group for name in layers[path] for group in groups_of(name)}
        if groups.isdisjoint(lora.groups) or not is_projection(param, "router"):
            continue
        keys = [jax.random.fold_in(key, zlib.crc32(name.encode())) for name in layers[path]]
        owner, name = functools.reduce(_child, path[:-1], model), str(path[-1])
        own = jnp.stack(keys) if path in stacked else keys[0]
        setattr(owner, name, Adapted(getattr(owner, name), lora, own))


def merged(model: _Model) -> _Model:
    """Returns a model in which parameters hold the values that layers read of adapted weights.

    Args:
        model: Model whose weights may have adapters; the function changes it.
    """
    for owner, name, weight in list(_adapted(model)):
        setattr(owner, name, weight.merged())
    model.config = dataclasses.replace(model.config, lora=None)
    return model


def check_merged(model: ModelConfig, source: str) -> None:
    """Rejects a model with adapters where only an ordinary model can be read.

    Args:
        model: Configuration of the model.
        source: Name of the model, for the message.

    Raises:
        ConfigError: If the model has adapters.
    """
    if model.lora is not None:
        raise ConfigError(f"{source} has adapters: write a run without them (merge_adapters)")


def is_adapter(name: str) -> bool:
    """Returns True for the name of ``A`` or ``B`` of an adapter in a state."""
    return name.endswith(_FACTORS)


def name_without_adapter(name: str) -> str:
    """Returns the name that an array of a model with adapters has in the model without them."""
    return name.removesuffix(_BASE)


def _adapted(model: nnx.Module) -> Iterator[tuple[nnx.Module, str, Adapted]]:
    for _, owner in nnx.iter_modules(model):
        for name, weight in vars(owner).items():
            if isinstance(weight, Adapted):
                yield owner, name, weight


def _child(module: Any, key: Any) -> Any:
    return module[key] if isinstance(key, int) else getattr(module, key)
