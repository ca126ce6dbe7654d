"""Continual learning: a model of Python learns four synthetic languages, and what it forgets.

GLaM's model of 16 experts goes on for a tenth of its steps on the languages: with all weights, with
a frozen router, with four new experts and the router alone, or with a quarter of replayed Python.
New experts are copies of the first four of each layer; the old experts and all weights outside of
MoE layers are frozen. An arm ``..._on_code`` is the same model on Python again.
"""

from moe_jax.experiments.base import beats_zlib, evaluated, saturated_model
from moe_jax.experiments.changed import adaptation

from moe_jax.ablation.ablation import Ablation, Changed, Claim

_SHARED = adaptation.ABLATION.arms
_MODEL, _LANGUAGES = _SHARED["e16"], _SHARED["before"]
_COPIES = (0, 1, 2, 3)
_WIDER = {"model.moe.num_experts": 16 + len(_COPIES)}
_ROUTER_FROZEN = _SHARED["all"] | {"optimizer.frozen": ("router",)}
_GROWN = (
    _SHARED["all"]
    | _WIDER
    | {
        "training.start_from": Changed("e16", "grow", (f"--copy={','.join(map(str, _COPIES))}",)),
        "optimizer.frozen_experts": 16,
        "optimizer.frozen": ("attention", "norms", "embedding"),
    }
)
_ON_CODE = "_on_code"

ABLATION = Ablation(
    name="continual",
    title="Continual learning: forgetting of the first text, gain on the second",
    base=saturated_model,
    arms={
        "e16": _MODEL,
        "before": _LANGUAGES,
        **{arm: _SHARED[arm] for arm in ("all", f"all{_ON_CODE}")},
        "router_frozen": _ROUTER_FROZEN,
        f"router_frozen{_ON_CODE}": _MODEL | evaluated("router_frozen"),
        "grown": _GROWN,
        f"grown{_ON_CODE}": _MODEL | _WIDER | evaluated("grown"),
        **{arm: _SHARED[arm] for arm in ("replay", "replay_on_languages", f"replay{_ON_CODE}")},
    },
    scales=adaptation.ABLATION.scales,
    seeds=12,
    registered="cabc9ac7f147bf6974cecd7175c0fffb31efdd86",
    claims=(
        Claim("Tuning all weights forgets (ours)", "loss", "e16", f"all{_ON_CODE}"),
        Claim(
            "New experts beside frozen ones forget less than all weights",
            "loss",
            f"grown{_ON_CODE}",
            f"all{_ON_CODE}",
            paper="Lifelong-MoE (2305.12281), in words",
        ),
        Claim("New experts learn the second text (ours)", "loss", "grown", "before"),
        Claim("New experts learn less than all weights (ours)", "loss", "all", "grown"),
        Claim(
            "A frozen router reduces forgetting (ours)",
            "loss",
            f"router_frozen{_ON_CODE}",
            f"all{_ON_CODE}",
        ),
        Claim(
            "A frozen router costs at most 0.01 nats of the second text (ours)",
            "loss",
            "all",
            "router_frozen",
            0.01,
            True,
        ),
        Claim(
            "A quarter of replayed text costs loss on the second text (ours)",
            "loss",
            "all",
            "replay_on_languages",
        ),
        Claim(
            "Replay forgets less than new experts (ours)",
            "loss",
            f"replay{_ON_CODE}",
            f"grown{_ON_CODE}",
        ),
    ),
    gates=(beats_zlib("e16"),),
)

get_config = ABLATION.get_config
