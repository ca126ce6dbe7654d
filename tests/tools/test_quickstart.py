import json

from moe_jax.ablation.catalogue import RESULTS
from tools.quickstart import largest_climb, training_curve


def test_a_point_of_the_curve_is_the_mean_over_25_steps():
    lines = [{"kind": "train", "step": s, "loss": float(s), "grad_norm": 1.0} for s in (5, 25, 30)]
    lines.append({"kind": "eval", "step": 30, "loss": 9.0})
    found = training_curve(lines)
    assert found == [
        {"step": 25, "loss": 15.0, "grad_norm": 1.0},
        {"step": 50, "loss": 30.0, "grad_norm": 1.0},
    ]


def test_a_climb_is_counted_from_the_lowest_value_before():
    assert largest_climb([5.0, 3.3, 5.1, 4.9]) == 5.1 - 3.3
    assert largest_climb([3.0, 2.0, 1.0]) == 0.0


def test_the_loss_of_the_committed_quickstart_does_not_climb():
    curve = json.loads((RESULTS / "quickstart" / "results.json").read_text())["curve"]
    losses = [point["loss"] for point in curve]
    assert [point["step"] for point in curve] == list(range(25, 601, 25))
    # Batches of 2,048 tokens are noisy: means over 25 of them differ by some 0.1 of a nat.
    assert largest_climb(losses) < 0.2
    # The norm of the gradient rises as loss falls, and does not double in the second half.
    assert curve[-1]["grad_norm"] < 1.5 * curve[11]["grad_norm"]
