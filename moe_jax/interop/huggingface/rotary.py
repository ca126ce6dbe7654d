"""Reads the rotary positions of a ``config.json``, in the current form and in older ones."""

from __future__ import annotations

import difflib
import math

from moe_jax.errors import ConfigError
from moe_jax.interop.huggingface.keys import Json, require
from moe_jax.nn.positions import LinearScaling, Llama3Scaling, Rotary, YarnScaling

_KEYS = {
    "alpha": float,
    "attention_factor": float,
    "beta_fast": float,
    "beta_slow": float,
    "factor": float,
    "finetuned": bool,
    "high_freq_factor": float,
    "low_freq_factor": float,
    # On text, positions of several dimensions are one position.
    "mrope_interleaved": bool,
    "mrope_section": list,
    "mscale": float,
    "mscale_all_dim": float,
    "original_max_position_embeddings": int,
    "partial_rotary_factor": float,
    "rope_theta": float,
    "rope_type": str,
    "truncate": bool,
    "type": str,
}


def parameters(config: Json) -> Json:
    """Returns the parameters of rotation that are not null.

    As in ``transformers``, ``rope_scaling`` takes precedence over ``rope_parameters``. If these
    lack ``rope_theta``, ``partial_rotary_factor`` or ``original_max_position_embeddings``, the keys
    of the configuration itself apply.

    Raises:
        ConfigError: If a key is unknown or has an impossible value.
    """
    name = "rope_scaling" if config["rope_scaling"] else "rope_parameters"
    given = {key: value for key, value in (config[name] or {}).items() if value is not None}
    for key, value in given.items():
        if key not in _KEYS:
            close = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"{name} has the unknown key {key!r}; the nearest known key is {close!r}"
            )
        require(value, _KEYS[key], f"{key} in {name}")
    length = config["original_max_position_embeddings"]
    given.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    for key in ("rope_theta", "partial_rotary_factor"):
        if config[key] is not None:
            given.setdefault(key, config[key])
    given["rope_type"] = given.get("rope_type") or given.get("type") or "default"
    return given | ({"original_max_position_embeddings": length} if length else {})


def rotary(config: Json, *, interleaved: bool = False, partial: bool = False) -> Rotary:
    """Returns the rotary positions that ``config`` describes.

    Args:
        config: All settings of the family.
        interleaved: Whether neighbouring features form the pairs that are rotated.
        partial: Whether the family may rotate a part of each head.

    Raises:
        ConfigError: If the ``rope_type`` is not supported, or one of its parameters is missing.
    """
    given = parameters(config)
    base = _positive(given, "rope_theta")
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None
    proportional = given["rope_type"] == "proportional"
    match given["rope_type"]:
        case "default":
            scaling = None
        case "proportional":
            scaling = LinearScaling(_positive(given, "factor")) if "factor" in given else None
        case "linear":
            scaling = LinearScaling(_positive(given, "factor"))
        case "llama3":
            scaling = Llama3Scaling(
                _positive(given, "factor"),
                _positive(given, "low_freq_factor"),
                _positive(given, "high_freq_factor"),
                int(_positive(given, "original_max_position_embeddings")),
            )
        case "yarn":
            scaling = _yarn(given)
        case kind:
            known = "linear, llama3, yarn, proportional"
            raise ConfigError(f"config.json has rope_type={kind!r}; known: {known}")
    share = _share(given, partial or proportional)
    return Rotary(base, interleaved, scaling, share, proportional)


def _share(given: Json, partial: bool) -> float:
    share = given.get("partial_rotary_factor", 1.0)
    if not (0 < share <= 1 if partial else share == 1):
        allowed = "a share above 0 and up to 1" if partial else "1.0"
        raise ConfigError(
            f"config.json says partial_rotary_factor={share!r}, but only {allowed} is supported"
        )
    return float(share)


def _positive(given: Json, name: str) -> float:
    kind = given["rope_type"]
    if name not in given:
        raise ConfigError(f"config.json lacks {name}, which rope_type={kind!r} needs")
    if given[name] <= 0:
        raise ConfigError(f"config.json says {name}={given[name]!r}, but it must be more than 0")
    return float(given[name])


def _yarn(given: Json) -> YarnScaling:
    factor = _positive(given, "factor")
    magnitude = _positive(given, "attention_factor") if "attention_factor" in given else 0.0
    if not magnitude and given.get("mscale") and given.get("mscale_all_dim"):
        magnitude = yarn_scale(factor, given["mscale"])
        magnitude /= yarn_scale(factor, given["mscale_all_dim"])
    return YarnScaling(
        factor=factor,
        original_length=int(_positive(given, "original_max_position_embeddings")),
        beta_fast=float(given.get("beta_fast") or 32),
        beta_slow=float(given.get("beta_slow") or 1),
        truncate=given.get("truncate", True),
        attention_factor=float(magnitude),
    )


def yarn_scale(factor: float, weight: float) -> float:
    """Returns the factor by which YaRN multiplies queries and keys (2309.00071, section 3.4)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
