"""Defines the interface of a family of ``transformers``, and helpers that families share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Generic, TypedDict, TypeVar

from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface.entries import Entry, Matrix, Same, Whole
from moe_jax.interop.huggingface.keys import Json, Keys, require
from moe_jax.models import ModelConfig
from moe_jax.nn.feed_forward import Activation
from moe_jax.nn.positions import LinearScaling, Llama3Scaling, Rotary, YarnScaling

Config = TypeVar("Config", bound=ModelConfig)
Part = TypeVar("Part")


class UnsupportedPart(ConfigError):
    """A model has a part that the family does not have.

    Attributes:
        part: The part of the model's configuration, or its value.
    """

    def __init__(self, part: object):
        """Creates the error for one part."""
        super().__init__(f"the family does not support {type(part).__name__}")
        self.part = part


def expect(part: object, kind: type[Part]) -> Part:
    """Returns ``part`` if it has the type that the family supports.

    Raises:
        UnsupportedPart: If ``part`` has another type.
    """
    if not isinstance(part, kind):
        raise UnsupportedPart(part)
    return part


@dataclasses.dataclass(frozen=True)
class Family(Generic[Config]):
    """One ``model_type`` of ``transformers``.

    Attributes:
        name: Name of the family, the ``model_type``.
        architecture: Class of ``transformers`` that loads the model.
        build: Function from the settings in ``keys.read`` to the model's configuration.
        write: Function from the model's configuration to ``config.json`` without the vocabulary.
        entries: Function that yields all tensors of a model.
        keys: Keys of ``config.json``.
        kind: Class of the model's configuration.
        vocab: Key of the vocabulary size.
        ignored: Suffixes of the names of tensors that are no parameters.
        prefix: Prefix of all names in a checkpoint that also holds other towers.
        beside: Function of ``config.json`` and a name that tells whether another tower owns the
            tensor.
        exact: Suffixes of the names of tensors that are always stored in float32.
        without: Function that removes settings whose tensors a file does not store, given the
            settings and the names of the stored tensors.
        copies: Names under which a file may store a second copy of a tensor, by the tensor's name.
        tied: Names of the head and of the embedding, which are one tensor if they are tied.
        base: Prefix of all names except the head's; ``transformers`` omits it for a bare model.
        renamed: Alternative spellings of parts of names, with the spelling used here.
        outer: Keys of a file that nests the configuration as ``text_config``; keys of
            the file itself take precedence over nested keys.
        aliases: Other values of ``model_type`` that files of the family have.
        exported: Family that exports have, if ``transformers`` has no causal model for this one.
    """

    name: str
    architecture: str
    build: Callable[[Json], Config]
    write: Callable[[Config], Json]
    entries: Callable[[Config], Iterator[Entry]]
    keys: Keys
    kind: type[Config]
    vocab: str = "vocab_size"
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    prefix: str = ""
    exact: tuple[str, ...] = ()
    beside: Callable[[Json, str], bool] = lambda config, name: False
    without: Callable[[Json, Collection[str]], Json] = lambda config, names: config
    copies: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    tied: tuple[str, str] = ("lm_head.weight", "model.embed_tokens.weight")
    base: str = "model."
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    outer: Keys | None = None
    aliases: tuple[str, ...] = ()
    exported: str = ""

    def settings(self, config: Json) -> Json:
        """Returns all settings of a ``config.json``, with defaults for absent keys.

        Raises:
            ConfigError: If a key is unknown, or has a value that is not supported.
        """
        where = "config.json"
        require(config, dict, where)
        if self.outer is not None and (
            "text_config" in config or config.get("model_type") in self.aliases
        ):
            outer = self.outer.filled(config, where)
            inner = require(outer.pop("text_config"), dict, "text_config in config.json")
            self._check_text(inner)
            config = inner | {key: value for key, value in outer.items() if value is not None}
            where = "text_config in config.json"
        return self.keys.filled(config, where)

    def _check_text(self, inner: Json) -> None:
        text = inner.get("model_type", self.name)
        if text not in (self.name, *self.aliases):
            raise ConfigError(
                f"text_config in config.json has model_type={text!r}, but the text model of "
                f"{' and '.join(map(repr, self.aliases))} is read as {self.name!r} only"
            )

    def read(self, config: Json) -> Config:
        """Returns the model's configuration that a ``config.json`` describes.

        Raises:
            ConfigError: If a setting is not supported, see ``settings``.
        """
        return self.build(self.settings(config))


ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "relu": "relu",
    "relu2": "relu2",
    "gelu": "gelu_exact",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
}
"""Activation of this package by its name in ``transformers``."""


class Heads(TypedDict):
    """The attention heads of a model: fields of ``ModelConfig``."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


def activation(name: str) -> Activation:
    """Returns the activation that ``transformers`` calls ``name``.

    Raises:
        ConfigError: If the activation is not supported.
    """
    if name not in ACTIVATIONS:
        raise ConfigError(f"hidden_act={name!r} is not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def heads_of(config: Json) -> Heads:
    """Returns the number of query heads, the number of key and value heads, and the head width.

    Raises:
        ConfigError: If the key heads do not divide the query heads, or the heads the model width.
    """
    heads, width = config["num_attention_heads"], config["hidden_size"]
    kv_heads = config["num_key_value_heads"] or heads
    for name, number, parts in (
        ("num_attention_heads", heads, kv_heads),
        *([] if config["head_dim"] else [("hidden_size", width, heads)]),
    ):
        if number % parts:
            raise ConfigError(
                f"config.json says {name}={number}, which is not a multiple of {parts}"
            )
    dim = config["head_dim"] or width // heads
    return {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim}


def rope_parameters(positions: Rotary) -> Json:
    """Returns the ``rope_parameters`` of a ``config.json``."""
    written: Json = {"rope_theta": positions.base, "rope_type": "default"}
    if positions.share != 1:
        written["partial_rotary_factor"] = positions.share
    if positions.proportional:
        written["rope_type"] = "proportional"
    match positions.scaling:
        case LinearScaling(factor) if positions.proportional:
            written["factor"] = factor
        case LinearScaling(factor):
            written |= {"rope_type": "linear", "factor": factor}
        case Llama3Scaling(factor, low, high, length):
            written |= {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": length,
            }
        case YarnScaling() as yarn:
            written |= {
                "rope_type": "yarn",
                "factor": yarn.factor,
                "original_max_position_embeddings": yarn.original_length,
                "beta_fast": yarn.beta_fast,
                "beta_slow": yarn.beta_slow,
                "truncate": yarn.truncate,
            }
            if yarn.attention_factor:
                written["attention_factor"] = yarn.attention_factor
    return written


def ends(config: ModelConfig, *, embedding: str, norm: str, head: str) -> Iterator[Entry]:
    """Yields the embedding, the final norm and the head of a decoder."""
    yield Entry(embedding, ("embedding.table",), Whole())
    yield Entry(norm, ("final_norm.scale",), Same())
    if not config.tie_embeddings:
        yield Entry(head, ("embedding.head",), Matrix())


def projections(
    theirs: str, ours: str, *, bias: bool, output_bias: bool, names: str = "qkv"
) -> Iterator[Entry]:
    """Yields the projections of an attention layer, ``q_proj`` to ``o_proj``.

    Args:
        theirs: Name of the attention layer in ``transformers``.
        ours: Name of the attention layer here.
        bias: Whether queries, keys and values have biases.
        output_bias: Whether the output has a bias.
        names: Letters of the projections that have tensors, beside the output's.
    """
    for letter, name in (("q", "query"), ("k", "key"), ("v", "value")):
        if letter not in names:
            continue
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
    """Yields the matrices of a feed-forward network.

    Args:
        theirs: Name of the network in ``transformers``.
        ours: Name of the network here.
        names: Name of each matrix in ``transformers``, by its name here.
        index: Index that selects an expert, such as ``|5``.
        suffix: Suffix of the names in ``transformers``.
    """
    for parameter, name in names.items():
        yield Entry(f"{theirs}.{name}{suffix}", (f"{ours}.{parameter}{index}",), Matrix())


GATED = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
"""Names of the matrices of Llama's gated feed-forward network, by their names here."""
