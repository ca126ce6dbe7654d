"""Switch table 6: distillation of a Switch model into a dense model of equal FLOPs."""

from moe_jax.experiments.base import SCALES, language_model

from moe_jax.ablation.ablation import Ablation, Claim, Finished, Published

_DENSE = {"model.moe.every": 0}
_INITIALISED = {"training.start_from": Finished("teacher"), "training.start_with": "shared"}


def _taught(weight: float) -> dict:
    return {"training.teacher": Finished("teacher"), "training.teacher_weight": weight}


ABLATION = Ablation(
    name="switch_distillation",
    title="Switch table 6: distillation into a dense model",
    base=language_model,
    arms={
        "teacher": {"model.moe.num_experts": 16},
        "student": _DENSE,
        "student_twice": _DENSE | {"training.steps": lambda config: 2 * config.training.steps},
        "distilled": _DENSE | _taught(1.0),
        "initialised_distilled": _DENSE | _INITIALISED | _taught(1.0),
        "initialised_mixed": _DENSE | _INITIALISED | _taught(0.25),
        "initialised": _DENSE | _INITIALISED,
    },
    scales=SCALES,
    published=(
        Published(
            "Switch table 6 (2101.03961)",
            "T5-Base taught by a Switch-Base of 3.8 billion parameters, C4",
            "negative log perplexity in nats",
            {
                "teacher": -1.444,
                "student": -1.636,
                "distilled": -1.631,
                "initialised_distilled": -1.598,
                "initialised_mixed": -1.580,
                "initialised": -1.639,
            },
            measures="loss",
            negated=True,
        ),
    ),
    claims=(
        Claim("The teacher has a lower loss than the student alone", "loss", "teacher", "student"),
        Claim(
            "Soft targets of weight 0.25 and the teacher's weights lower the student's loss",
            "loss",
            "initialised_mixed",
            "student",
        ),
        Claim("Soft targets alone lower the student's loss", "loss", "distilled", "student"),
        Claim(
            "The teacher's weights lower the loss of distillation",
            "loss",
            "initialised_distilled",
            "distilled",
        ),
        Claim(
            "Soft targets of weight 0.25 give a lower loss than soft targets alone",
            "loss",
            "initialised_mixed",
            "initialised_distilled",
        ),
        Claim(
            "The teacher's weights alone do not lower the student's loss",
            "loss",
            "student",
            "initialised",
            0.02,
            True,
        ),
        Claim(
            "Twice the steps lower the student's loss more than the teacher's weights (ours)",
            "loss",
            "student_twice",
            "initialised",
        ),
        Claim(
            "Twice the steps lower the student's loss more than distillation (ours)",
            "loss",
            "student_twice",
            "initialised_mixed",
        ),
    ),
    notes=(
        "Training ends here long before convergence, so the teacher's weights may only act like "
        "more training steps. The arm `student_twice` therefore trains the student for as many "
        "steps as the teacher and a student together. Three seeds do not resolve whether more "
        "steps have the same effect.",
    ),
)

get_config = ABLATION.get_config
