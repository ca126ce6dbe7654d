"""Quality against size: pruned, merged and quantised experts, with and without recovery steps.

GLaM's model of 16 experts is changed by the commands of ``docs/changing_models.md`` and evaluated.
Recovery is a tenth of the steps of training at a tenth of its rate; ``trained_further`` is the
unchanged model with the same steps.
"""

from moe_jax.experiments.base import REGISTERED, beats_zlib, evaluated, saturated_model
from moe_jax.experiments.glam import experts

from moe_jax.ablation.ablation import Ablation, Changed, Claim, Finished

_MODEL = experts.ABLATION.arms["e16"]
_RECOVERY = {
    "training.steps": lambda config: config.training.steps // 10,
    "training.checkpoint_every": lambda config: config.training.checkpoint_every // 10,
    "optimizer.learning_rate": lambda config: config.optimizer.learning_rate / 10,
}
_REAP = "REAP (2510.13999), accuracy at half of the experts"


def _with(number: int) -> dict:
    return _MODEL | {"model.moe.num_experts": number}


def _reduced(command: str, number: int, *flags: str) -> dict:
    return _with(number) | evaluated("e16", command, f"--experts={number}", *flags)


def _recovered(command: str, number: int, *flags: str) -> dict:
    change = Changed("e16", command, (f"--experts={number}", *flags))
    return _with(number) | _RECOVERY | {"training.start_from": change}


ABLATION = Ablation(
    name="compression",
    title="Pruned, merged and quantised experts",
    base=saturated_model,
    arms={
        "e16": _MODEL,
        "load_12": _reduced("prune", 12, "--by=load"),
        "load_8": _reduced("prune", 8, "--by=load"),
        "output_12": _reduced("prune", 12, "--by=output"),
        "output_8": _reduced("prune", 8, "--by=output"),
        "loss_8": _reduced("prune", 8, "--by=loss"),
        "merged_12": _reduced("merge", 12),
        "merged_8": _reduced("merge", 8),
        "int8": _MODEL | evaluated("e16", "quantise", "--bits=int8"),
        "int4": _MODEL | evaluated("e16", "quantise", "--bits=int4"),
        "trained_further": _MODEL | _RECOVERY | {"training.start_from": Finished("e16")},
        "output_8_recovered": _recovered("prune", 8, "--by=output"),
        "load_8_recovered": _recovered("prune", 8, "--by=load"),
        "merged_8_recovered": _recovered("merge", 8),
    },
    scales=REGISTERED,
    seeds=12,
    registered="e51f927efdd154758a927de64b45a43d320d3f3f",
    claims=(
        Claim(
            "Pruning by gate and output has a lower loss than pruning by load",
            "loss",
            "output_8",
            "load_8",
            paper=_REAP,
        ),
        Claim(
            "Pruning by gate and output has a lower loss than merging",
            "loss",
            "output_8",
            "merged_8",
            paper=_REAP,
        ),
        Claim(
            "After recovery, merging has a lower loss than pruning by load",
            "loss",
            "merged_8_recovered",
            "load_8_recovered",
            paper="M-SMoE (2310.01334), accuracy after fine-tuning",
        ),
        Claim("Eight bits cost at most 0.01 nats (ours)", "loss", "e16", "int8", 0.01, True),
        Claim("Four bits raise the loss (ours)", "loss", "e16", "int4"),
        Claim(
            "Greedy pruning by loss has a lower loss than pruning by gate and output (ours)",
            "loss",
            "loss_8",
            "output_8",
        ),
        Claim(
            "Half of the experts, recovered, have a higher loss than all (ours)",
            "loss",
            "trained_further",
            "output_8_recovered",
        ),
    ),
    gates=(beats_zlib("e16"),),
)

get_config = ABLATION.get_config
