"""Writes the ``config.json`` of an exported model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface.family import Family, Json, UnsupportedPart
from moe_jax.interop.huggingface.function import function_of
from moe_jax.models import ModelConfig

CARRIED = frozenset(
    {
        # Special tokens and lengths of texts.
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "decoder_start_token_id",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "tokenizer_class",
        "max_position_embeddings",
        "max_seq_len",
        "n_positions",
        "_name_or_path",
        # Training in transformers.
        "initializer_range",
        "initializer_factor",
        "init_std",
        "attention_dropout",
        "activation_dropout",
        "dropout",
        "dropout_rate",
        "emb_pdrop",
        "resid_pdrop",
        "encoder_layerdrop",
        "decoder_layerdrop",
        "router_aux_loss_coef",
        "router_z_loss_coef",
        "router_jitter_noise",
        "aux_loss_alpha",
        "seq_aux",
        # Serving in transformers; an expert here has a slot for every token.
        "expert_capacity",
        "moe_eval_capacity_token_fraction",
        "router_dtype",
        "router_ignore_padding_tokens",
        "is_encoder_decoder",
        "use_cache",
    }
)
"""Settings of the original ``config.json`` that an export keeps; they do not change the model."""


def description(
    family: Family[Any],
    config: ModelConfig,
    vocab_size: int,
    dtype: str,
    original: Json | None = None,
) -> Json:
    """Returns the ``config.json`` of a model.

    Args:
        family: Family to write.
        config: Configuration of the model.
        vocab_size: Number of rows of the embedding.
        dtype: Data type of the tensors.
        original: The ``config.json`` that the model was loaded with. The export keeps its settings
            that are in ``CARRIED`` and that the family has, so that no setting appears in both an
            older and a newer spelling.

    Raises:
        ConfigError: If the family cannot express the model; the message names the setting.
    """
    outer = original or {}
    inner = outer.get("text_config") or {}
    given = {**outer, **inner}
    same = given.get("model_type", family.name) in (family.name, *family.aliases)
    known = {*family.keys.read, *family.keys.unread}
    # Another family has other settings, but token ids belong to the tokenizer and stay valid.
    kept = {
        key: value
        for key, value in given.items()
        if key in CARRIED & known and (same or key.endswith("_token_id"))
    }
    written = kept | _written(family, config) | {family.vocab: vocab_size}
    written |= {"model_type": family.name, "architectures": [family.architecture], "dtype": dtype}
    _check_same_model(family, written, config)
    return written


def families_of(families: dict[str, Family[Any]], config: ModelConfig) -> list[str]:
    """Returns the names of the families that can express a model."""
    names = []
    for name, family in families.items():
        try:
            description(family, config, 1, "float32")
        except ConfigError:
            continue
        names.append(name)
    return names


def _written(family: Family[Any], config: ModelConfig) -> Json:
    culprit: Any = config
    if isinstance(config, family.kind):
        try:
            return family.write(config)
        except UnsupportedPart as error:
            culprit = error.part
        except ConfigError:
            raise
        except KeyError as error:
            culprit = error.args[0]
        except (TypeError, ValueError, IndexError):
            pass
    raise ConfigError(f"{family.name} cannot express {_setting(config, culprit)}")


def _setting(config: ModelConfig, culprit: Any) -> str:
    """Returns the name and the value of the setting whose value is ``culprit``."""
    for name, value in _settings(config, "model"):
        if value is culprit or (isinstance(culprit, str) and value == culprit):
            shown = value if isinstance(value, str) else type(value).__name__
            return f"{name}={shown}"
    return f"this {type(config).__name__}"


def _settings(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        yield f"{path}.{field.name}", inner
        if dataclasses.is_dataclass(inner):
            yield from _settings(inner, f"{path}.{field.name}")


def _check_same_model(family: Family[Any], written: Json, config: ModelConfig) -> None:
    """Rejects a model that differs from the model which ``config.json`` describes."""
    try:
        back = function_of(family.read(written))
    except KeyError as error:
        raise ConfigError(
            f"{family.name} cannot express a model without {error.args[0]}"
        ) from error
    except ConfigError as error:
        raise ConfigError(f"{family.name} cannot express this model: {error}") from error
    wanted = function_of(config)
    different = [n for n in {**wanted, **back} if wanted.get(n) != back.get(n)]
    if different:
        name = different[0]
        raise ConfigError(
            f"{family.name} cannot express {name}={wanted.get(name)!r}; a reader would get "
            f"{back.get(name)!r}"
        )
