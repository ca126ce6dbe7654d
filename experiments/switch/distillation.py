"""Switch table 6: a Switch model distilled into its dense twin."""

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
        Claim("The teacher is better than the student alone", "loss", "teacher", "student"),
        Claim(
            "A quarter of soft targets, with the teacher's weights, beats the student alone",
            "loss",
            "initialised_mixed",
            "student",
        ),
        Claim("Soft targets alone gain a little", "loss", "distilled", "student"),
        Claim(
            "The teacher's weights help distillation", "loss", "initialised_distilled", "distilled"
        ),
        Claim(
            "A quarter of soft targets is better than soft targets alone",
            "loss",
            "initialised_mixed",
            "initialised_distilled",
        ),
        Claim(
            "The teacher's weights alone gain nothing", "loss", "student", "initialised", 0.02, True
        ),
        Claim(
            "They are worth less than as many steps of the student's own (ours)",
            "loss",
            "student_twice",
            "initialised",
        ),
        Claim("which beat distillation too (ours)", "loss", "student_twice", "initialised_mixed"),
    ),
    notes=(
        "Training ends here long before it converges, so the teacher's weights may be no more than "
        "more training: `student_twice` is the student alone for as many steps as the teacher and "
        "a student together. Three seeds do not tell the two apart.",
    ),
)

get_config = ABLATION.get_config
