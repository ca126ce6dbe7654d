"""Adapting a mixture to other text: all weights, some of them, or low-rank adapters.

GLaM's model of 16 experts, trained on Python, learns four synthetic languages in a tenth of its
steps. Weights take a tenth of the rate of training, and adapters ten times the rate of weights;
``adapters_slowly`` takes the rate of weights. An arm ``..._on_code`` is the adapted model on the
text that the first training had, the Python library at every scale.
"""

from moe_jax.experiments.base import REGISTERED, beats_zlib, evaluated, saturated_model
from moe_jax.experiments.glam import experts

from moe_jax.ablation.ablation import Ablation, Claim, Finished

_MODEL = experts.ABLATION.arms["e16"]
_OTHER_TEXT = {"data.source": "mixture"}
_CODE = {"name": "code", "source": "python_library", "weight": 0.25}
_LANGUAGES = {"name": "languages", "source": "mixture", "weight": 0.75}
_SHORT = {
    "training.steps": lambda config: config.training.steps // 10,
    "training.checkpoint_every": lambda config: config.training.checkpoint_every // 10,
    "training.start_from": Finished("e16"),
}
_SLOWER = {"optimizer.learning_rate": lambda config: config.optimizer.learning_rate / 10}
_SCALES = {
    scale: {name: value for name, value in sizes.items() if name != "data.source"}
    for scale, sizes in REGISTERED.items()
}
_PARTS = ("experts", "attention", "norms", "embedding", "router")


def _adapted(*trained: str) -> dict:
    frozen = tuple(part for part in _PARTS if part not in trained)
    return _MODEL | _OTHER_TEXT | _SHORT | _SLOWER | {"optimizer.frozen": frozen}


def _adapters(groups: tuple[str, ...]) -> dict:
    lora = {"model.lora.rank": 4, "model.lora.groups": groups}
    return _MODEL | _OTHER_TEXT | _SHORT | lora


ABLATION = Ablation(
    name="adaptation",
    title="Adapting a mixture to other text",
    base=saturated_model,
    arms={
        "e16": _MODEL,
        "before": _MODEL | _OTHER_TEXT | evaluated("e16"),
        "all": _adapted(*_PARTS),
        "router": _adapted("router"),
        "attention": _adapted("attention"),
        "experts": _adapted("experts"),
        "all_but_experts": _adapted(*_PARTS[1:]),
        "adapters": _adapters(("experts",)),
        "adapters_everywhere": _adapters(("experts", "attention", "router")),
        "adapters_slowly": _adapters(("experts",)) | _SLOWER,
        "replay": _adapted(*_PARTS)
        | {"data.source": "blend", "data.blend.parts": (_CODE, _LANGUAGES)},
        "replay_on_languages": _MODEL | _OTHER_TEXT | evaluated("replay"),
        "all_on_code": _MODEL | evaluated("all"),
        "router_on_code": _MODEL | evaluated("router"),
        "experts_on_code": _MODEL | evaluated("experts"),
        "all_but_experts_on_code": _MODEL | evaluated("all_but_experts"),
        "adapters_on_code": _MODEL | evaluated("adapters", "merge_adapters"),
        "adapters_slowly_on_code": _MODEL | evaluated("adapters_slowly", "merge_adapters"),
        "replay_on_code": _MODEL | evaluated("replay"),
    },
    scales=_SCALES,
    seeds=12,
    registered="45f4a8b3081be85e349888ee49e8b75038380e8e",
    claims=(
        Claim(
            "Tuning experts alone has a higher loss than tuning all other weights",
            "loss",
            "all_but_experts",
            "experts",
            paper="ST-MoE (2202.08906), fine-tuning of parts on SuperGLUE; in words",
        ),
        Claim(
            "Adapters of experts learn less than all weights",
            "loss",
            "all",
            "adapters",
            paper="LoRA learns less and forgets less (2405.09673), dense models",
        ),
        Claim(
            "Adapters of experts forget less than all weights",
            "loss",
            "adapters_on_code",
            "all_on_code",
            paper="LoRA learns less and forgets less (2405.09673), dense models",
        ),
        Claim(
            "Adapters of experts have a lower loss than a tuned router (ours)",
            "loss",
            "adapters",
            "router",
        ),
        Claim(
            "A tuned router has a lower loss than the model before (ours)",
            "loss",
            "router",
            "before",
        ),
        Claim(
            "A quarter of replayed text reduces forgetting (ours)",
            "loss",
            "replay_on_code",
            "all_on_code",
        ),
        Claim(
            "A tuned router forgets less than tuned experts (ours)",
            "loss",
            "router_on_code",
            "experts_on_code",
        ),
    ),
    notes=(
        "Adapters take ten times the rate of the weights here, and forget more. At the rate of the "
        "weights they forget less than all weights, as the paper says: `adapters_slowly_on_code` "
        "was added after the verdict, and no claim reads it.",
    ),
    gates=(beats_zlib("e16"),),
)

get_config = ABLATION.get_config
