import pytest

from moe_jax.ablation.sizes import MeasuredSeries, PublishedSeries, QualityBySize
from moe_jax.errors import ConfigError


def test_printed_scores_are_shares_of_the_unchanged_models():
    series = PublishedSeries("prune", "A paper", {0.5: 30.0, 1.0: 40.0})
    assert series.relative == {0.5: 0.75, 1.0: 1.0}


@pytest.mark.parametrize("scores", [{0.5: 30.0}, {0.5: 30.0, 1.0: 0.0}])
def test_scores_without_one_of_the_unchanged_model_are_refused(scores):
    with pytest.raises(ConfigError, match="A paper, table 1: .* at size 1"):
        PublishedSeries("prune", "A paper, table 1", scores)


def test_sizes_name_arms_and_methods():
    sizes = QualityBySize(
        {
            "pruned": MeasuredSeries("prune", "whole", {0.75: "twelve", 0.5: "eight"}),
            "pruned, recovered": MeasuredSeries("prune", "trained", {0.5: "recovered"}),
        },
        {
            "theirs": PublishedSeries("merge", "A paper", {1.0: 1.0}),
            "theirs too": PublishedSeries("prune", "A paper", {1.0: 1.0}),
        },
    )
    assert list(sizes.arms) == ["whole", "twelve", "eight", "trained", "recovered"]
    assert sizes.methods == ["prune", "merge"]
