"""Counts of models like Nemotron 3, and of one layer of Kimi K3's shape."""

import dataclasses

import pytest

import moe_jax as mj
from moe_jax import routing
from moe_jax.config import library
from moe_jax.counting import Cost, count
from moe_jax.models import DecoderConfig
from moe_jax.nn.moe_config import MoEConfig
from moe_jax.nn.shared import SharedConfig

VOCAB, STATE, GROUPS, CONV = 131072, 128, 8, 4


@dataclasses.dataclass(frozen=True)
class Published:
    """The layers of a published model that are not MoE layers, and its printed parameters.

    Attributes:
        mamba: Number of Mamba-2 layers.
        attention: Number of attention layers, with 32 query heads and 2 key heads of 128.
        heads: Number of heads of 64 of a Mamba-2 layer.
        total: Printed number of parameters.
        active: Printed number of active parameters, embeddings included.
        source: Publication that prints the numbers.
    """

    mamba: int
    attention: int
    heads: int
    total: float
    active: float
    source: str

    def others(self, width: int) -> int:
        """Returns the parameters of Mamba-2, attention, their norms, embedding and head."""
        inner = 64 * self.heads
        mixed = inner + 2 * GROUPS * STATE
        # Maps in and out; a convolution with bias; A, D and the bias of dt; two norms.
        mamba = width * (inner + mixed + self.heads) + inner * width + mixed * (CONV + 1)
        mamba += 3 * self.heads + inner + width
        attention = 2 * width * 32 * 128 + 2 * width * 2 * 128 + width
        return self.mamba * mamba + self.attention * attention + 2 * VOCAB * width + width


PUBLISHED = {
    "nemotron_3_nano_like": Published(23, 6, 64, 31.6e9, 3.6e9, "2512.20848, section 2.1"),
    "nemotron_3_super_like": Published(40, 8, 128, 120.6e9, 12.7e9, "2604.12374, section 2.1"),
}


def mixture(cost: Cost) -> tuple[int, int]:
    """Returns total and active parameters of the MoE layers, with shared experts and norms."""
    total = sum(cost.parameters[part] for part in ("experts", "router", "dense"))
    return total, total - (cost.total - cost.active)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_moe_layers_and_the_published_other_layers_have_the_printed_parameters(name: str):
    published, width = PUBLISHED[name], mj.load_config(name).model.width
    total, active = mixture(mj.count(name))
    others = published.others(width)
    assert (total + others) / published.total == pytest.approx(1, abs=0.002)
    assert (active + others) / published.active == pytest.approx(1, abs=0.01)


def test_a_layer_of_super_by_hand():
    cost, moe = mj.count("nemotron_3_super_like"), mj.load_config("nemotron_3_super_like").model.moe
    sizes = (moe.num_experts, moe.latent_dim, moe.expert_dim, moe.shared.hidden)
    assert sizes == (512, 1024, 2688, 5376)
    assert cost.parameters["experts"] == 40 * 512 * 2 * 1024 * 2688
    assert cost.parameters["router"] == 40 * 512 * 4096
    # The shared expert, two projections and the norm before the layer.
    assert cost.parameters["dense"] == 40 * (2 * 4096 * 5376 + 2 * 4096 * 1024 + 4096)
    assert cost.flops_by_part["experts"] == 2 * 40 * 22 * 2 * 1024 * 2688


def test_models_like_published_ones_are_not_listed_as_published():
    for name in (*PUBLISHED, "latent_moe"):
        assert (library.CONFIGS / f"{name}.py").is_file()
        assert not (library.PUBLISHED / f"{name}.py").exists()


def test_both_variants_of_the_small_model_have_equal_experts():
    latent, wide = (mj.count(f"latent_moe:{variant}") for variant in ("latent", "wide"))
    assert latent.parameters["experts"] == wide.parameters["experts"]
    assert latent.flops_by_part["experts"] == wide.flops_by_part["experts"]
    # Two layers: 24 further columns of the router, and two projections of 128 * 32.
    assert latent.total - wide.total == 2 * (24 * 128 + 2 * 128 * 32)


def test_an_unknown_variant_of_the_small_model_is_named():
    with pytest.raises(mj.ConfigError, match="unknown variant 'narrow'; known: latent, wide"):
        mj.load_config("latent_moe:narrow")


def test_a_layer_of_the_shape_of_kimi_k3():
    # 896 gated experts of 3072 in a latent space of 3584, half the width of 7168; a token takes 16
    # of them and two shared experts of full width.
    moe = MoEConfig(
        every=1,
        num_experts=896,
        expert_dim=3072,
        latent_dim=3584,
        shared=SharedConfig(2 * 3072),
        router=routing.preset("deepseek_v3", k=16, groups=1, keep_groups=1),
    )
    config = DecoderConfig(num_layers=1, width=7168, gated=True, activation="silu", moe=moe)
    cost = count(config, 8, 1)
    one = 3 * 3584 * 3072
    every_token = 3 * 7168 * 2 * 3072 + 2 * 7168 * 3584 + 7168
    assert mixture(cost) == (
        896 * one + every_token + 7168 * 896,
        16 * one + every_token + 7168 * 896,
    )
    # Without the latent space, each expert would have twice the parameters.
    plain = dataclasses.replace(config, moe=dataclasses.replace(moe, latent_dim=0))
    assert count(plain, 8, 1).parameters["experts"] == 2 * 896 * one
