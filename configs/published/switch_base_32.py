"""Switch-Base with 32 experts (Fedus et al. 2021, 2101.03961; released as base/e32).

Table 9 prints gated layers of width 2048; the released configuration, used here, has plain layers
of width 3072 and the same size.
"""

from ml_collections import ConfigDict
from moe_jax.configs.families import t5

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 2.0e9, 0.02, "Switch table 7"),
    PublishedNumber("flops_per_sequence.kaplan", 124e9, 0.005, "Switch table 9"),
)


def get_config() -> ConfigDict:
    return t5.switch_base("switch_base_32", experts=32)
