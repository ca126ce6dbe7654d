import pytest

from experiments.changed import compression
from moe_jax.quantised.codes import size_of_expert


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_size_of_quantised_experts_is_that_of_their_codes_and_scales(precision):
    model = compression.ABLATION.experiment("e16").model
    assert not model.gated
    shapes = ((model.width, model.moe.expert_dim), (model.moe.expert_dim, model.width))
    share = sum(size_of_expert(shape, precision) for shape in shapes)
    share /= sum(4 * inputs * outputs for inputs, outputs in shapes)
    sizes = {
        size
        for series in compression.ABLATION.sizes.measured.values()
        for size, arm in series.arms.items()
        if arm.split("_")[0] == precision
    }
    assert sizes == {round(share, 2)}


def test_the_size_of_pruned_and_merged_experts_is_their_share():
    ablation = compression.ABLATION
    for series in ablation.sizes.measured.values():
        whole = ablation.experiment(series.reference).model.moe.num_experts
        assert whole == ablation.experiment("e16").model.moe.num_experts
        for size, arm in series.arms.items():
            experts = ablation.experiment(arm).model.moe.num_experts
            assert experts == (whole if series.method == "quantise" else size * whole)


def test_the_share_of_merged_experts_agrees_with_the_printed_numbers_of_parameters():
    # Li et al. print 220 million parameters with one expert in each of 12 layers, 733 million after
    # the merge, and 2.0 billion with 32 experts in each layer.
    share = min(compression.ABLATION.sizes.published["M-SMoE, fine-tuned"].scores)
    expert = (733e6 - 220e6) / (share * 12 * 32 - 12)
    assert round((220e6 + 12 * 31 * expert) / 1e9, 1) == 2.0
