"""Switch-C (Fedus et al. 2021, 2101.03961; released as c/e2048): every layer has 2048 experts.

Table 9 prints 32 heads; the released configuration has 30.
"""

from ml_collections import ConfigDict
from moe_jax.configs.families import t5

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 1571e9, 0.001, "Switch table 9"),
    PublishedNumber(
        "flops_per_sequence.kaplan",
        890e9,
        0.005,
        "Switch table 9",
        wrong="of 32 heads, which give 894G; the released model has 30",
    ),
)


def get_config() -> ConfigDict:
    name = "switch_c_2048"
    base = t5.t5(name, layers=15, width=2080, heads=30, mlp_dim=6144, tie_embeddings=False)
    return t5.switch(name, 2048, capacity=(1.0, 2.0), base=base, group_size=2048, every=1)
