"""Switch appendix C: exploration by sampled experts or by noise on the router's input."""

from moe_jax.configs.common import router
from moe_jax.experiments.base import REGISTERED, beats_zlib, gates_from_one, saturated_model

from moe_jax.ablation.ablation import Ablation, Claim, Published


def _arm(**choices: float | bool) -> dict:
    return {"model.moe.router": router("switch", **{"input_jitter": 0.0, **choices})}


ABLATION = Ablation(
    name="switch_exploration",
    title="Switch appendix C: exploration across experts",
    base=saturated_model,
    arms={
        "argmax": _arm(),
        "sample": _arm(sample=True),
        # Rate of Mesh-TensorFlow's moe_switch_dropout; the paper does not print its rate.
        "input_dropout": _arm(input_dropout=0.1),
        "input_jitter": _arm(input_jitter=1e-2),
        "gates_from_1": {"model.moe.router": gates_from_one},
    },
    scales=REGISTERED,
    seeds=12,
    registered="e0083e1940936396e9a797ac14eb75ff6b22e312",
    published=(
        Published(
            "Switch table 11 (2101.03961)",
            "T5-Base with experts, C4",
            "negative log perplexity in nats",
            {"argmax": -1.471, "sample": -1.570, "input_dropout": -1.480, "input_jitter": -1.468},
            measures="loss",
            negated=True,
        ),
    ),
    claims=(
        Claim("Sampling has a higher loss than argmax (.099)", "loss", "argmax", "sample"),
        Claim(
            "Sampling has a higher loss than input jitter (.102)", "loss", "input_jitter", "sample"
        ),
        Claim(
            "Input dropout has a higher loss than argmax (.009)", "loss", "argmax", "input_dropout"
        ),
        Claim(
            "Input jitter and argmax have about the same loss (.003)",
            "loss",
            "input_jitter",
            "argmax",
            # Half of .009, which input dropout costs.
            0.0045,
            True,
        ),
        Claim(
            "With input jitter, gates that start at 1 lower the loss (ours)",
            "loss",
            "gates_from_1",
            "input_jitter",
        ),
    ),
    gates=(beats_zlib("argmax"),),
)

get_config = ABLATION.get_config
