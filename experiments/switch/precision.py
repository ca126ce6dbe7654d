"""Switch table 2: bfloat16 models with a router in bfloat16 or in float32."""

from moe_jax.configs.common import router
from moe_jax.experiments.base import SCALES, language_model

from moe_jax.ablation.ablation import Ablation, Claim, Published


def _arm(dtype: str, precision: str) -> dict:
    return {
        "model.compute_dtype": lambda _: dtype,
        "model.moe.router": router("switch", precision=precision),
    }


ABLATION = Ablation(
    name="switch_precision",
    title="Switch table 2: selective precision",
    base=language_model,
    arms={
        "float32": _arm("float32", "float32"),
        "bfloat16": _arm("bfloat16", "input"),
        "selective": _arm("bfloat16", "float32"),
    },
    scales=SCALES,
    published=(
        Published(
            "Switch table 2 (2101.03961)",
            "T5-Base with 32 experts, C4, early in training",
            "negative log perplexity in nats",
            {"float32": -1.718, "bfloat16": -3.780, "selective": -1.716},
            measures="loss",
            negated=True,
        ),
        Published(
            "Switch table 2 (2101.03961)",
            "the same",
            "examples per second",
            {"float32": 1160, "bfloat16": 1390, "selective": 1390},
            measures="tokens_per_second",
        ),
    ),
    claims=(
        Claim(
            "A router in bfloat16 has a higher loss than a router in float32",
            "loss",
            "selective",
            "bfloat16",
        ),
        Claim(
            "Selective precision and float32 have about the same loss",
            "loss",
            "selective",
            "float32",
            0.02,
            True,
        ),
    ),
)

get_config = ABLATION.get_config
