"""Switch table 3: initial weights a tenth as large in variance."""

from experiments.ablation import Ablation, Claim, Published
from experiments.base import SCALES, language_model

ABLATION = Ablation(
    name="switch_init_scale",
    title="Switch table 3: scale of the initial weights",
    base=language_model,
    arms={"0.1": {"model.init_scale": 0.1}, "1.0": {"model.init_scale": 1.0}},
    scales=SCALES,
    published=(
        Published(
            "Switch table 3 (2101.03961)",
            "T5-Base with 32 experts, C4, 3.5k steps",
            "average negative log perplexity in nats, standard deviations 0.01 and 0.68",
            {"0.1": -2.72, "1.0": -3.60},
            measures="loss",
            negated=True,
        ),
    ),
    claims=(Claim("A scale of 0.1 is better", "loss", "0.1", "1.0"),),
)

get_config = ABLATION.get_config
