"""Quality against size: pruned, merged and quantised experts, with and without recovery steps.

GLaM's model of 16 experts is changed by the commands of ``docs/changing_models.md`` and evaluated.
Recovery is a tenth of the steps of training at a tenth of its rate; ``trained_further`` is the
unchanged model with the same steps. Quantised experts stay as they are while the other weights
recover; that arm and its claim were added after the registration and before its runs. Recovery of
the other sizes was added after the first look, for the curves, and no claim reads it.
"""

from statistics import fmean

from moe_jax.experiments.base import REGISTERED, beats_zlib, evaluated, saturated_model
from moe_jax.experiments.glam import experts

from moe_jax.ablation.ablation import Ablation, Changed, Claim, Finished
from moe_jax.ablation.sizes import MeasuredSeries, PublishedSeries, QualityBySize

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


def _quantised_and_recovered(bits: str) -> dict:
    change = Changed("e16", "quantise", (f"--bits={bits}",))
    return _MODEL | _RECOVERY | {"training.start_from": change, "optimizer.frozen": ("experts",)}


# Codes and scales of experts as shares of 32-bit weights, at scale ``cpu``.
_INT8, _INT4 = 0.27, 0.15
_BY_LOAD, _BY_OUTPUT, _BY_LOSS = "prune by load", "prune by output", "prune by loss"
_MERGE, _QUANTISE = "merge", "quantise"
# Table 2 of REAP has means over coding tasks and over multiple-choice tasks. The figure leaves out
# its methods EAN and HC-SMoE, which no command implements.
_CODING = "REAP (2510.13999v2), table 2: Qwen3-30B-A3B, Code Avg"
_CHOICE = "REAP (2510.13999v2), table 2: Qwen3-30B-A3B, MC Avg"
# In table 2 of Li et al., one of 12 layers keeps its 32 experts, and the others have 8 on average.
# A score is the mean over its eight tasks, with the exact matches of SQuAD and HotpotQA.
_EIGHT_OF_32 = (32 + 11 * 8) / (12 * 32)
_TUNED = (
    "Li et al. 2024 (2310.01334), table 2: switch-base-32, mean of eight tasks after fine-tuning"
)
_FULL = fmean((95.75, 90.20, 76.19, 68.00, 61.80, 65.39, 96.45, 67.55))
_PRUNED = fmean((94.50, 88.97, 75.13, 63.00, 61.64, 64.80, 96.27, 67.39))
_MERGED = fmean((94.50, 90.69, 75.57, 68.00, 61.80, 65.66, 96.34, 67.91))

_SIZES = QualityBySize(
    measured={
        "pruned by load": MeasuredSeries(_BY_LOAD, "e16", {0.75: "load_12", 0.5: "load_8"}),
        "pruned by output": MeasuredSeries(_BY_OUTPUT, "e16", {0.75: "output_12", 0.5: "output_8"}),
        "pruned by loss": MeasuredSeries(_BY_LOSS, "e16", {0.5: "loss_8"}),
        "merged": MeasuredSeries(_MERGE, "e16", {0.75: "merged_12", 0.5: "merged_8"}),
        "quantised from 32 bits": MeasuredSeries(_QUANTISE, "e16", {_INT8: "int8", _INT4: "int4"}),
        "pruned by load, recovered": MeasuredSeries(
            _BY_LOAD, "trained_further", {0.75: "load_12_recovered", 0.5: "load_8_recovered"}
        ),
        "pruned by output, recovered": MeasuredSeries(
            _BY_OUTPUT, "trained_further", {0.75: "output_12_recovered", 0.5: "output_8_recovered"}
        ),
        "pruned by loss, recovered": MeasuredSeries(
            _BY_LOSS, "trained_further", {0.5: "loss_8_recovered"}
        ),
        "merged, recovered": MeasuredSeries(
            _MERGE, "trained_further", {0.75: "merged_12_recovered", 0.5: "merged_8_recovered"}
        ),
        "quantised, recovered": MeasuredSeries(
            _QUANTISE, "trained_further", {_INT8: "int8_recovered", _INT4: "int4_recovered"}
        ),
    },
    published={
        "frequency, coding": PublishedSeries(
            _BY_LOAD, _CODING, {1.0: 0.558, 0.75: 0.553, 0.5: 0.452}
        ),
        "frequency, multiple choice": PublishedSeries(
            _BY_LOAD, _CHOICE, {1.0: 0.721, 0.75: 0.600, 0.5: 0.483}
        ),
        "REAP, coding": PublishedSeries(_BY_OUTPUT, _CODING, {1.0: 0.558, 0.75: 0.551, 0.5: 0.541}),
        "REAP, multiple choice": PublishedSeries(
            _BY_OUTPUT, _CHOICE, {1.0: 0.721, 0.75: 0.665, 0.5: 0.503}
        ),
        "M-SMoE, coding": PublishedSeries(_MERGE, _CODING, {1.0: 0.558, 0.75: 0.537, 0.5: 0.397}),
        "M-SMoE, multiple choice": PublishedSeries(
            _MERGE, _CHOICE, {1.0: 0.721, 0.75: 0.558, 0.5: 0.451}
        ),
        "pruned by use, fine-tuned": PublishedSeries(
            _BY_LOAD, _TUNED, {1.0: _FULL, _EIGHT_OF_32: _PRUNED}
        ),
        "M-SMoE, fine-tuned": PublishedSeries(_MERGE, _TUNED, {1.0: _FULL, _EIGHT_OF_32: _MERGED}),
        "AWQ from 16 to 4 bits": PublishedSeries(
            _QUANTISE,
            "REAP (2510.13999v2), table A5: Qwen3-30B-A3B, Eval+",
            {1.0: 81.4, 0.25: 80.5},
        ),
    },
)

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
        "int4_recovered": _quantised_and_recovered("int4"),
        "output_12_recovered": _recovered("prune", 12, "--by=output"),
        "load_12_recovered": _recovered("prune", 12, "--by=load"),
        "loss_8_recovered": _recovered("prune", 8, "--by=loss"),
        "merged_12_recovered": _recovered("merge", 12),
        "int8_recovered": _quantised_and_recovered("int8"),
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
        Claim(
            "Four bits cost at most 0.01 nats after recovery of the other weights (ours)",
            "loss",
            "trained_further",
            "int4_recovered",
            0.01,
            True,
        ),
    ),
    sizes=_SIZES,
    notes=(
        "Losses of pruned and merged models without recovery vary by 0.1 to 0.2 nats between "
        "seeds. The pooled variance contains them, so the small effects of quantisation need "
        "eight seeds although they vary by 0.005 nats or less.",
        "The arms `merged` are those of `moe-jax merge` without `--redirect`: the logits of merged "
        "members are left out. M-SMoE keeps these logits and merges different numbers of experts "
        "in each layer, so the published points are of another variant.",
        "Some runs were paused while they trained, and their seconds include the pause.",
    ),
    gates=(beats_zlib("e16"),),
)

get_config = ABLATION.get_config
