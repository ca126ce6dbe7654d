"""Switch table 4: fine-tuning on little text with dropout, and with more dropout in the experts.

Models of Python source are tuned on the protocol buffer definitions of Google's APIs, which TFDS
installs: a third of a megabyte of C-like declarations with English comments.
"""

from importlib import metadata

from ml_collections import ConfigDict
from moe_jax.experiments.base import SCALES, language_model

from moe_jax.ablation.ablation import Ablation, Claim, Finished, Published

_DENSE = {"model.moe.every": 0}


def _definitions(_: ConfigDict) -> str:
    root = metadata.distribution("googleapis-common-protos").locate_file("google")
    return f"files:{root}/**/*.proto"


def _tuned(pretrained: str, dropout: float, expert_dropout: float = 0.0) -> dict:
    return {
        "training.start_from": Finished(pretrained),
        "data.source": _definitions,
        "data.eval_documents": lambda _: None,
        "training.steps": lambda config: config.training.steps // 2,
        "training.eval_every": lambda config: config.training.steps // 40,
        "optimizer.learning_rate": 1e-3,
        "model.dropout": dropout,
        "model.moe.expert_dropout": expert_dropout,
    }


def _published(task: str, scores: tuple[float, ...]) -> Published:
    arms = ("dense_0.1", "switch_0.1", "switch_0.2", "switch_0.3", "switch_0.1_experts_0.4")
    return Published(
        "Switch table 4 (2101.03961)",
        "T5-Base and Switch-Base pre-trained on 34 billion tokens of C4",
        f"{task}, higher is better",
        dict(zip(arms, scores, strict=True)),
    )


ABLATION = Ablation(
    name="switch_fine_tuning",
    title="Switch table 4: dropout in fine-tuning",
    base=language_model,
    arms={
        "pretrained_dense": _DENSE,
        "pretrained_switch": {},
        "dense_0.1": _DENSE | _tuned("pretrained_dense", 0.1),
        "switch_0.0": _tuned("pretrained_switch", 0.0),
        "switch_0.1": _tuned("pretrained_switch", 0.1),
        "switch_0.2": _tuned("pretrained_switch", 0.2),
        "switch_0.3": _tuned("pretrained_switch", 0.3),
        "switch_0.1_experts_0.4": _tuned("pretrained_switch", 0.1, 0.4),
    },
    scales=SCALES,
    metric="best_loss",
    published=(
        _published("GLUE", (82.9, 84.7, 84.4, 83.9, 85.2)),
        _published("CNN/Daily Mail", (19.6, 19.1, 19.2, 19.6, 19.6)),
        _published("SQuAD", (83.5, 83.7, 83.9, 83.4, 83.7)),
        _published("SuperGLUE", (72.4, 73.0, 73.2, 70.7, 73.0)),
    ),
    claims=(
        Claim(
            "Switch reaches a lower loss in tuning than a dense model (GLUE, SQuAD, SuperGLUE)",
            "best_loss",
            "switch_0.1",
            "dense_0.1",
            paper="Switch table 4: GLUE 84.7 against 82.9",
        ),
        Claim(
            "More dropout in the experts alone lowers the loss (GLUE and CNN/Daily Mail)",
            "best_loss",
            "switch_0.1_experts_0.4",
            "switch_0.1",
            paper="Switch table 4: GLUE 85.2 against 84.7",
        ),
        Claim(
            "More dropout everywhere raises the loss (GLUE, SQuAD and SuperGLUE)",
            "best_loss",
            "switch_0.1",
            "switch_0.3",
            paper="Switch table 4: GLUE 84.7 against 83.9",
        ),
        Claim(
            "No dropout has a lower loss than 0.1 (ours)",
            "best_loss",
            "switch_0.0",
            "switch_0.1",
        ),
    ),
    notes=(
        "The paper tunes models of 223 million parameters and more on little data, where "
        "dropout prevents overfitting. Models of this size still underfit at the end of "
        "tuning: their last validation loss is the lowest, and it is lower without dropout.",
    ),
)

get_config = ABLATION.get_config
