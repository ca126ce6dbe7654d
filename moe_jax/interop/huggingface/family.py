"""What a family of ``transformers`` must say, and what many of them share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping

from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface.entries import Entry, Matrix, Same, Whole
from moe_jax.interop.huggingface.keys import Json, Keys, require
from moe_jax.models import ModelConfig
from moe_jax.nn.positions import LinearScaling, Llama3Scaling, Rotary, YarnScaling


@dataclasses.dataclass(frozen=True)
class Family:
    """One ``model_type``.

    Attributes:
        name: the ``model_type``.
        architecture: the class of ``transformers`` that loads it.
        build: all keys of ``keys.read`` to our configuration.
        write: our configuration to ``config.json``, without the vocabulary.
        entries: all tensors of a model.
        keys: the keys of ``config.json``.
        vocab: the key of the vocabulary's size.
        ignored: ends of names of tensors that hold nothing of the model.
        prefix: before all names in a checkpoint of the model with other towers.
        beside: given ``config.json`` and a name, whether the tensor is of another tower.
        exact: ends of names of tensors that are float32 whatever the others are.
        without: the settings less what they announce but no tensor of these names holds.
        copies: other names that files store a tensor under once more, by its name.
        tied: the name of the head, and of the embedding that it is where they are tied.
        base: before all names but the head's; ``transformers`` leaves it out for a bare model.
        renamed: parts of names that some files spell otherwise, and as they are here.
        outer: the keys of a file that holds the configuration as its ``text_config``.
    """

    name: str
    architecture: str
    build: Callable[[Json], ModelConfig]
    write: Callable[[ModelConfig], Json]
    entries: Callable[[ModelConfig], Iterator[Entry]]
    keys: Keys
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

    def settings(self, config: Json) -> Json:
        """Returns all settings of a ``config.json``, with the defaults that it leaves out.

        Raises:
            ConfigError: if a key is unknown, or has a value that is not supported.
        """
        where = "config.json"
        require(config, dict, where)
        if self.outer is not None and (
            "text_config" in config or config.get("model_type") == OUTER
        ):
            config = self.outer.filled(config, where)["text_config"]
            where = "text_config in config.json"
        return self.keys.filled(config, where)

    def read(self, config: Json) -> ModelConfig:
        """Returns the configuration of a ``config.json``.

        Raises:
            ConfigError: see ``settings``.
        """
        return self.build(self.settings(config))


OUTER = "llama4"

ACTIVATIONS = {"silu": "silu", "relu": "relu", "gelu": "gelu_exact", "gelu_new": "gelu"}


def activation(name: str) -> str:
    """Returns our name of an activation.

    Raises:
        ConfigError: if there is none.
    """
    if name not in ACTIVATIONS:
        raise ConfigError(f"hidden_act={name!r} is not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def heads_of(config: Json) -> dict[str, int]:
    """Returns the attention's heads: theirs, those of keys and values, and their width.

    Raises:
        ConfigError: if one does not divide another.
    """
    heads, width = config["num_attention_heads"], config["hidden_size"]
    of_keys = config["num_key_value_heads"] or heads
    for name, number, parts in (
        ("num_attention_heads", heads, of_keys),
        *([] if config["head_dim"] else [("hidden_size", width, heads)]),
    ):
        if number % parts:
            raise ConfigError(
                f"config.json says {name}={number}, which is not a multiple of {parts}"
            )
    dim = config["head_dim"] or width // heads
    return {"num_heads": heads, "num_kv_heads": of_keys, "head_dim": dim}


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
