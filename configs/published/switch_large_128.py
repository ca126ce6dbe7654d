"""Switch-Large (Fedus et al. 2021, 2101.03961; released as large/e128).

Table 9 prints gated layers of 2816, which give 27.1B and 433G FLOPs. The released plain layers of
4096 give the printed 26B and 425G FLOPs and are used here.
"""

from ml_collections import ConfigDict
from moe_jax.configs.families import t5

from moe_jax.counting import PublishedNumber

PUBLISHED = (
    PublishedNumber("total", 26e9, 0.02, "Switch table 9"),
    PublishedNumber("flops_per_sequence.kaplan", 425e9, 0.005, "Switch table 9"),
)


def get_config() -> ConfigDict:
    name = "switch_large_128"
    base = t5.large_size(name)
    return t5.switch(name, 128, capacity=(1.25, 2.0), base=base, group_size=4096)
