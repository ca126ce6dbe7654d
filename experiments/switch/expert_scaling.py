"""Switch section 3.1: more experts at equal FLOPs per token and equal steps."""

from experiments.ablation import Ablation, Claim, Published
from experiments.base import SCALES, language_model

# Parameters of the paper's points give E (T5-Base of 223M; table 7's pre-trained row).
_PUBLISHED = {"dense": -1.636, "e16": -1.505, "e32": -1.474, "e64": -1.444}

ABLATION = Ablation(
    name="switch_expert_scaling",
    title="Switch: scaling the number of experts on a step basis",
    base=language_model,
    arms={
        "dense": {"model.moe.every": 0},
        **{f"e{n}": {"model.moe.num_experts": n} for n in (2, 4, 8, 16, 32, 64)},
    },
    scales=SCALES,
    published=(
        Published(
            "Switch table 7 (2101.03961)",
            "T5-Base, C4, 550k steps",
            "negative log perplexity in nats",
            _PUBLISHED,
        ),
    ),
    claims=(
        Claim("2 experts are better than dense (appendix D)", "loss", "e2", "dense"),
        Claim("8 experts are better than dense (appendix D)", "loss", "e8", "dense"),
        Claim("16 experts are better than 4", "loss", "e16", "e4"),
        Claim("64 experts are better than 16", "loss", "e64", "e16"),
    ),
)

get_config = ABLATION.get_config
