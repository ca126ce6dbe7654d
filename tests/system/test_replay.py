"""A run records its routing; another, that chooses nothing itself, repeats it step by step."""

import numpy as np

from tests.system.runs import CONFIG, records, train

SETTINGS = ("--config.training.steps=6", "--config.training.eval_every=0")
# The losses of the router are no part of a replay.
RECORDED = ("--config.model.moe.router.balance_weight=0.0", "--config.training.record_routing=True")
FORCED = (
    "--config.model.moe.router.preset=forced",
    "--config.model.moe.router.k=2",
    "--config.model.moe.router.normalize=True",
)


def test_a_replayed_run_has_the_losses_and_loads_of_the_recorded_one(source, tmp_path):
    config = f"{CONFIG}:gshard"
    recorded, replayed = tmp_path / "recorded", tmp_path / "replayed"
    train(recorded, config, source, *SETTINGS, *RECORDED)
    files = sorted(path.name for path in (recorded / "routing").iterdir())
    assert files == [f"{step:08d}.npz" for step in range(1, 7)]
    replay = f"--config.training.replay_routing={recorded / 'routing'}"
    # On another mesh, too.
    train(replayed, config, source, *SETTINGS, *FORCED, replay, "--config.mesh.expert=2", devices=2)
    pairs = list(zip(records(recorded), records(replayed), strict=True))
    assert len(pairs) == 6 and any(first["dropped_fraction"] > 0 for first, _ in pairs)
    for first, second in pairs:
        np.testing.assert_allclose(second["loss"], first["loss"], rtol=1e-5)
        np.testing.assert_allclose(second["grad_norm"], first["grad_norm"], rtol=1e-4)
        for one, two in zip(first["layers"], second["layers"], strict=True):
            np.testing.assert_allclose(two["load"], one["load"], rtol=1e-6)
