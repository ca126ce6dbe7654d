"""Charts of pairs of experts, some of whose numbers are unknown."""

from moe_jax.analysis.expert_maps import maps_of


def test_a_chart_without_numbers_is_left_out():
    # Experts of several widths have no similarity of weights.
    layer = {
        "together": [[1.0, 0.0], [0.0, 1.0]],
        "similarity": {"weights": [[None, None]] * 2, "outputs": [[1.0, 0.5], [0.5, 1.0]]},
    }
    assert [title for title, _ in maps_of(layer)] == ["Similarity of outputs"]
