"""What a family of ``transformers`` must say, and what many of them share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface.entries import Entry, Matrix, Same, Whole
from moe_jax.models import ModelConfig
from moe_jax.nn.positions import LinearScaling, Llama3Scaling, Rotary, YarnScaling

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """One ``model_type``.

    Attributes:
        name: the ``model_type``.
        architecture: the class of ``transformers`` that loads it.
        read: ``config.json`` to our configuration.
        write: our configuration to ``config.json``, without the vocabulary.
        entries: all tensors of a model.
        vocab: the key of the vocabulary's size.
        ignored: ends of names of tensors that hold nothing of the model.
        prefix: before all names in a checkpoint of the model with other towers.
        beside: given ``config.json`` and a name, whether the tensor is of another tower.
        exact: ends of names of tensors that are float32 whatever the others are.
        without: ``config.json`` less what it announces but no tensor of these names holds.
    """

    name: str
    architecture: str
    read: Callable[[Json], ModelConfig]
    write: Callable[[ModelConfig], Json]
    entries: Callable[[ModelConfig], Iterator[Entry]]
    vocab: str = "vocab_size"
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    prefix: str = ""
    exact: tuple[str, ...] = ()
    beside: Callable[[Json, str], bool] = lambda config, name: False
    without: Callable[[Json, Collection[str]], Json] = lambda config, names: config


ACTIVATIONS = {"silu": "silu", "relu": "relu", "gelu": "gelu_exact", "gelu_new": "gelu"}


def activation(name: str) -> str:
    """Returns our name of an activation.

    Raises:
        ConfigError: if there is none.
    """
    if name not in ACTIVATIONS:
        raise ConfigError(f"hidden_act={name!r} is not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def refuse(config: Json, **wanted: Any) -> None:
    """Refuses a ``config.json`` that says something else than ``wanted`` where it says anything.

    Raises:
        ConfigError: naming the setting.
    """
    for name, value in wanted.items():
        if config.get(name) not in (value, None):
            raise ConfigError(
                f"config.json says {name}={config[name]!r}, which is only supported as {value!r}"
            )


def rotary(config: Json, *, interleaved: bool = False, default: float = 10000.0) -> Rotary:
    """Reads rotary positions, in the form of today or of older files."""
    given = config.get("rope_parameters") or {}
    old = config.get("rope_scaling") or {}
    given = {"rope_theta": config.get("rope_theta") or default, **old, **given}
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind == "default":
        scaling = None
    elif kind == "linear":
        scaling = LinearScaling(float(given["factor"]))
    elif kind == "llama3":
        scaling = Llama3Scaling(
            float(given["factor"]),
            float(given["low_freq_factor"]),
            float(given["high_freq_factor"]),
            given["original_max_position_embeddings"],
        )
    elif kind == "yarn":
        scaling = _yarn(given)
    else:
        raise ConfigError(f"config.json has rope_type={kind!r}; known: linear, llama3, yarn")
    return Rotary(float(given["rope_theta"]), interleaved, scaling)


def _yarn(given: Json) -> YarnScaling:
    factor = float(given["factor"])
    magnitude = given.get("attention_factor") or 0.0
    if not magnitude and given.get("mscale") and given.get("mscale_all_dim"):
        magnitude = yarn_scale(factor, given["mscale"])
        magnitude /= yarn_scale(factor, given["mscale_all_dim"])
    return YarnScaling(
        factor=factor,
        original_length=given["original_max_position_embeddings"],
        beta_fast=float(given.get("beta_fast") or 32),
        beta_slow=float(given.get("beta_slow") or 1),
        truncate=given.get("truncate", True),
        attention_factor=float(magnitude),
    )


def yarn_scale(factor: float, weight: float) -> float:
    """Returns what YaRN multiplies queries and keys by."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_parameters(positions: Rotary) -> Json:
    """Writes rotary positions."""
    found: Json = {"rope_theta": positions.base, "rope_type": "default"}
    match positions.scaling:
        case LinearScaling(factor):
            found |= {"rope_type": "linear", "factor": factor}
        case Llama3Scaling(factor, low, high, length):
            found |= {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": length,
            }
        case YarnScaling() as yarn:
            found |= {
                "rope_type": "yarn",
                "factor": yarn.factor,
                "original_max_position_embeddings": yarn.original_length,
                "beta_fast": yarn.beta_fast,
                "beta_slow": yarn.beta_slow,
                "truncate": yarn.truncate,
            }
            if yarn.attention_factor:
                found["attention_factor"] = yarn.attention_factor
    return found


def ends(config: ModelConfig, *, embedding: str, norm: str, head: str) -> Iterator[Entry]:
    """Yields the embedding, the last norm and the head of a decoder."""
    yield Entry(embedding, ("embedding.table",), Whole())
    yield Entry(norm, ("final_norm.scale",), Same())
    if not config.tie_embeddings:
        yield Entry(head, ("embedding.head",), Matrix())


def projections(theirs: str, ours: str, *, bias: bool, output_bias: bool) -> Iterator[Entry]:
    """Yields ``q_proj`` to ``o_proj``."""
    for letter, name in (("q", "query"), ("k", "key"), ("v", "value")):
        yield Entry(f"{theirs}.{letter}_proj.weight", (f"{ours}.{name}",), Matrix())
        if bias:
            yield Entry(f"{theirs}.{letter}_proj.bias", (f"{ours}.{name}_bias",), Same())
    yield Entry(f"{theirs}.o_proj.weight", (f"{ours}.output",), Matrix(2))
    if output_bias:
        yield Entry(f"{theirs}.o_proj.bias", (f"{ours}.output_bias",), Same())


def network(
    theirs: str,
    ours: str,
    names: dict[str, str],
    index: str = "",
    suffix: str = ".weight",
) -> Iterator[Entry]:
    """Yields the matrices of a feed-forward network; ``names`` maps ours to theirs."""
    for mine, name in names.items():
        yield Entry(f"{theirs}.{name}{suffix}", (f"{ours}.{mine}{index}",), Matrix())


GATED = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
