"""Two arms that train in a second."""

from moe_jax.ablation.ablation import Ablation, Claim, Published
from tests.system import tiny


def _base():
    config = tiny.get_config()
    config.data.update(source="mixture", eval_documents=4)
    config.data.mixture.update(num_documents=64, num_eval_documents=4, document_length=64)
    config.training.update(eval_every=0, checkpoint_every=2)
    return config


ABLATION = Ablation(
    name="tiny",
    title="Tiny",
    base=_base,
    arms={"dense": {"model.moe.every": 0}, "switch": {"model.moe.num_experts": 2}},
    scales={"cpu": {"training.steps": 4}, "gpu": {"training.steps": 8}},
    seeds=2,
    published=(Published("A paper, table 1", "large", "loss", {"switch": 1.5}),),
    claims=(Claim("Switch is better", "loss", "switch", "dense"),),
)

get_config = ABLATION.get_config
