"""All families of ``transformers`` that are read and written."""

from __future__ import annotations

from typing import Any

from moe_jax.errors import ConfigError, nearest
from moe_jax.interop.huggingface.afmoe import AFMOE
from moe_jax.interop.huggingface.dbrx import DBRX
from moe_jax.interop.huggingface.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from moe_jax.interop.huggingface.dense import LLAMA, QWEN2, QWEN3
from moe_jax.interop.huggingface.dots import DOTS1
from moe_jax.interop.huggingface.encoder_decoders import NLLB_MOE, SWITCH
from moe_jax.interop.huggingface.ernie import ERNIE4_5_MOE
from moe_jax.interop.huggingface.exaone import EXAONE_MOE
from moe_jax.interop.huggingface.family import Family
from moe_jax.interop.huggingface.flex_olmo import FLEX_OLMO
from moe_jax.interop.huggingface.fused import GPT_OSS, LLAMA4
from moe_jax.interop.huggingface.gemma import GEMMA4
from moe_jax.interop.huggingface.glm import GLM4_MOE
from moe_jax.interop.huggingface.granite import GRANITEMOE
from moe_jax.interop.huggingface.hunyuan import HUNYUAN_V1_MOE
from moe_jax.interop.huggingface.keys import require
from moe_jax.interop.huggingface.llama_like import MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE
from moe_jax.interop.huggingface.minimax import MINIMAX_M2
from moe_jax.interop.huggingface.mistral4 import MISTRAL4
from moe_jax.interop.huggingface.towers import GLM4V_MOE, QWEN3_VL_MOE

_FAMILIES: tuple[Family[Any], ...] = (
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    OLMOE,
    DBRX,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    LLAMA4,
    GPT_OSS,
    GLM4_MOE,
    MINIMAX_M2,
    GRANITEMOE,
    ERNIE4_5_MOE,
    HUNYUAN_V1_MOE,
    DOTS1,
    EXAONE_MOE,
    GEMMA4,
    FLEX_OLMO,
    AFMOE,
    MISTRAL4,
    SWITCH,
    NLLB_MOE,
    LLAMA,
    QWEN2,
    QWEN3,
)
FAMILIES: dict[str, Family[Any]] = {family.name: family for family in _FAMILIES}
"""Families that are read and written, by ``model_type``."""

TOWERS: dict[str, Family[Any]] = {family.name: family for family in (QWEN3_VL_MOE, GLM4V_MOE)}
"""Text models that are read from files with a vision tower, by ``model_type``."""

_ALL = FAMILIES | TOWERS
_OTHER_LAYERS = {
    "nemotron_h": "Mamba-2 layers; the config nemotron_3_super_like has its MoE layers"
}
_ALIASES = {alias: name for name, family in _ALL.items() for alias in family.aliases}


def family_of(model_type: Any) -> Family[Any]:
    """Returns the family of a ``model_type``.

    Raises:
        ConfigError: If no family has this ``model_type``.
    """
    require(model_type, str, "model_type in config.json")
    name = _ALIASES.get(model_type, model_type)
    if name in _OTHER_LAYERS:
        raise ConfigError(f"model_type={name!r} cannot be read: it has {_OTHER_LAYERS[name]}")
    if name not in _ALL:
        raise ConfigError(f"model_type={model_type!r} is unknown{nearest(name, _ALL)}")
    return _ALL[name]
